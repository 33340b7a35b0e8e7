// The emulator's scheduler and its table of kernels. Compiled with g++ by the tests.
#define SCONCE_EMULATE 1
#include "emulate.h"
#include "kernels.cu"

#include <csetjmp>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

namespace emulate {

thread_local Index thread_index, block_index, block_size, grid_size;
thread_local unsigned char *shared_memory;

namespace {

constexpr size_t STACK = 256 << 10;
constexpr u32 THREADS_MAX = 1024;

struct Copy {
    void *to;
    const void *from;
    u32 bytes, group;
};

struct Fiber {
    std::vector<Copy> copies;  // in order
    u32 groups;                // committed
    ucontext_t start;
    jmp_buf place;
    Index index;
    u32 lane, warp;
    u32 operations;  // warp-wide ones so far
    bool started, done;
    const u32 *gate;  // waits until this changes
    u32 seen;
};

struct Gate {
    u32 arrived, passed;
};

struct Scheduler {
    Fiber fibers[THREADS_MAX];
    Shown shown[THREADS_MAX / 32];
    Gate warps[THREADS_MAX / 32], block;
    u32 live, live_in[THREADS_MAX / 32];
    Fiber *current;
    jmp_buf place;
    ucontext_t context;
    unsigned char *stacks;
    std::vector<unsigned char> shared;
    const char *complaint;
    void (*run)(const void *);
    const void *arguments;
};

thread_local Scheduler *scheduler;

/// Lets others run until `gate` has been passed.
void wait(Gate &gate, u32 expected) {
    u32 seen = gate.passed;
    if (++gate.arrived == expected) {
        gate.arrived = 0;
        ++gate.passed;
        return;
    }
    Fiber &self = *scheduler->current;
    self.gate = &gate.passed;
    self.seen = seen;
    if (_setjmp(self.place) == 0) _longjmp(scheduler->place, 1);
    self.gate = nullptr;
}

void enter() {
    Scheduler &s = *scheduler;
    s.run(s.arguments);
    Fiber &self = *s.current;
    self.done = true;
    --s.live;
    --s.live_in[self.warp];
    // Those that wait for all must not wait for this one.
    for (Gate *gate : {&s.block, &s.warps[self.warp]}) {
        u32 expected = gate == &s.block ? s.live : s.live_in[self.warp];
        if (expected > 0 && gate->arrived == expected) {
            gate->arrived = 0;
            ++gate->passed;
        }
    }
    _longjmp(s.place, 1);
}

void resume(Fiber &fiber) {
    Scheduler &s = *scheduler;
    s.current = &fiber;
    thread_index = fiber.index;
    if (_setjmp(s.place) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

void prepare(u32 threads) {
    Scheduler &s = *scheduler;
    memset(s.warps, 0, sizeof s.warps);
    memset(s.live_in, 0, sizeof s.live_in);
    s.block = {0, 0};
    s.live = threads;
    for (u32 i = 0; i < threads; ++i) {
        Fiber &fiber = s.fibers[i];
        fiber.index = {i % block_size.x, i / block_size.x, 0};
        fiber.lane = i % 32;
        fiber.warp = i / 32;
        fiber.operations = 0;
        fiber.copies.clear();
        fiber.groups = 0;
        fiber.started = fiber.done = false;
        fiber.gate = nullptr;
        ++s.live_in[fiber.warp];
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = s.stacks + i * STACK;
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
    }
}

/// Runs one block; `backwards` takes threads in the other order, which shows missing barriers.
void run_block(u32 threads, bool backwards) {
    Scheduler &s = *scheduler;
    prepare(threads);
    while (s.live > 0 && !s.complaint) {
        bool moved = false;
        for (u32 i = 0; i < threads && !s.complaint; ++i) {
            Fiber &fiber = s.fibers[backwards ? threads - 1 - i : i];
            if (fiber.done || (fiber.gate && *fiber.gate == fiber.seen)) continue;
            moved = true;
            resume(fiber);
        }
        if (!moved) s.complaint = "threads wait for each other for ever";
    }
}

}  // namespace

void block_barrier() { wait(scheduler->block, scheduler->live); }

u32 lane() { return scheduler->current->lane; }

const u32 (*show(const u32 *words, int count))[8] {
    Scheduler &s = *scheduler;
    Fiber &self = *s.current;
    if (s.live_in[self.warp] != 32) fail("a warp-wide operation without all lanes");
    auto &set = s.shown[self.warp].words[self.operations++ % 2];
    for (int i = 0; i < count; ++i) set[self.lane][i] = words[i];
    wait(s.warps[self.warp], 32);
    return set;
}

void begin_copy(void *to, const void *from, u32 bytes) {
    Fiber &self = *scheduler->current;
    self.copies.push_back({to, from, bytes, self.groups});
}

void commit_copies() { ++scheduler->current->groups; }

void finish_copies(u32 pending) {
    Fiber &self = *scheduler->current;
    size_t done = 0;
    for (const Copy &copy : self.copies) {
        if (copy.group + pending >= self.groups) break;
        if (copy.from) {
            memcpy(copy.to, copy.from, copy.bytes);
        } else {
            memset(copy.to, 0, copy.bytes);
        }
        ++done;
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + done);
}

void fail(const char *message) {
    Scheduler &s = *scheduler;
    s.complaint = message;
    _longjmp(s.place, 1);
}

struct Kernel {
    const char *name;
    void (*run)(const void *);
    u32 argument_bytes;
};

template <class A, void (*K)(A)>
Kernel entry(const char *name) {
    return {name, [](const void *arguments) { K(*(const A *)arguments); }, (u32)sizeof(A)};
}

#define KERNEL(name, arguments) entry<arguments, name>(#name),
const Kernel KERNELS[] = {
#include "list.inc"
};
#undef KERNEL

}  // namespace emulate

/// Runs a kernel; returns a complaint, or null. `geometry` is grid, block and bytes of shared
/// memory, `backwards` another order of threads and blocks.
extern "C" const char *emulate_launch(const char *name, const u32 *geometry, bool backwards,
                                      const void *arguments, u32 argument_bytes) {
    using namespace emulate;
    const Kernel *kernel = nullptr;
    for (const Kernel &candidate : KERNELS) {
        if (strcmp(candidate.name, name) == 0) kernel = &candidate;
    }
    if (!kernel) return "there is no such kernel";
    if (kernel->argument_bytes != argument_bytes) return "its arguments have another size";
    if (!scheduler) {
        scheduler = new Scheduler();
        scheduler->stacks =
            (unsigned char *)mmap(nullptr, STACK * THREADS_MAX, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    Scheduler &s = *scheduler;
    s.complaint = nullptr;
    s.run = kernel->run;
    s.arguments = arguments;
    grid_size = {geometry[0], geometry[1], geometry[2]};
    block_size = {geometry[3], 1, 1};
    if (block_size.x == 0 || block_size.x > THREADS_MAX) return "a block of too many threads";
    // One byte less than asked for would be a defect, and is found by a sanitizer.
    s.shared.assign(geometry[4] + 16, 0);
    shared_memory = (unsigned char *)(((uintptr_t)s.shared.data() + 15) / 16 * 16);
    u64 blocks = (u64)grid_size.x * grid_size.y * grid_size.z;
    for (u64 i = 0; i < blocks && !s.complaint; ++i) {
        u64 block = backwards ? blocks - 1 - i : i;
        block_index = {(u32)(block % grid_size.x), (u32)(block / grid_size.x % grid_size.y),
                       (u32)(block / grid_size.x / grid_size.y)};
        memset(shared_memory, 0xFF, geometry[4]);
        run_block(block_size.x, backwards);
    }
    return s.complaint;
}
