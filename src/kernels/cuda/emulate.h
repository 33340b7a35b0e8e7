// Runs kernels on a processor: the threads of a block are fibers of one thread, which take turns
// at barriers and warp-wide operations. For tests only. What is checked on the way: barriers that
// not all threads reach, warp-wide operations in divergent code, and (by poison) shared memory
// that nobody has written.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = unsigned long long;

struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};

namespace emulate {

struct Index {
    u32 x, y, z;
};

/// Values that the lanes of a warp show each other: two sets, used in turn, so that one barrier
/// an operation is enough.
struct Shown {
    u32 words[2][32][8];
};

extern thread_local Index thread_index, block_index, block_size, grid_size;
extern thread_local unsigned char *shared_memory;

/// Waits for all threads of the block.
void block_barrier();
/// Shows `count` words to the warp; returns what all lanes show, by lane.
const u32 (*show(const u32 *words, int count))[8];
/// This thread's lane.
u32 lane();
/// Notes a copy, of zeros if `from` is null; ends a group of copies; carries out all but the last
/// `pending` groups.
void begin_copy(void *to, const void *from, u32 bytes);
void commit_copies();
void finish_copies(u32 pending);
/// The emulator's own complaint: ends the launch.
void fail(const char *message);

inline float as_float(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline u32 as_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}

}  // namespace emulate

#define threadIdx emulate::thread_index
#define blockIdx emulate::block_index
#define blockDim emulate::block_size
#define gridDim emulate::grid_size
/// Kernels run one after the other here.
inline void begin() {}

#define SHARED_MEMORY(name) unsigned char *name = emulate::shared_memory

inline void __syncthreads() { emulate::block_barrier(); }
inline void __syncwarp() { emulate::show(nullptr, 0); }

// Arithmetic that must not be contracted or reordered.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline u32 __float_as_uint(float x) { return emulate::as_bits(x); }
inline float __uint_as_float(u32 x) { return emulate::as_float(x); }
inline u32 __umulhi(u32 a, u32 b) { return (u64)a * b >> 32; }
inline u64 __umul64hi(u64 a, u64 b) { return (unsigned __int128)a * b >> 64; }

template <class T>
T atomicAdd(T *to, T value) {
    T old = *to;
    *to = old + value;
    return old;
}

template <class T>
T atomicMax(T *to, T value) {
    T old = *to;
    *to = old > value ? old : value;
    return old;
}

template <class T>
T atomicOr(T *to, T value) {
    T old = *to;
    *to = old | value;
    return old;
}

// Blocks run one after the other here.
inline void __threadfence() {}
template <class T>
T __ldcg(const T *from) {
    return *from;
}

inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
inline u32 max(u32 a, u32 b) { return a > b ? a : b; }

// Conversions, to nearest even.

inline u16 to_bf16(float x) {
    u32 bits = emulate::as_bits(x);
    if (x != x) return 0x7FFF;
    return (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(u16 x) { return emulate::as_float((u32)x << 16); }

inline u16 to_f16(float x) {
    u32 bits = emulate::as_bits(x);
    u16 sign = (u16)(bits >> 16 & 0x8000);
    float size = fabsf(x);
    if (x != x) return 0x7FFF;
    if (size >= 65520.0f) return sign | 0x7C00;
    if (size < 6.103515625e-5f) {
        // Below the smallest normal number steps are 2^-24 wide.
        return sign | (u16)rintf(size * 16777216.0f);
    }
    bits = emulate::as_bits(size);
    u32 rounded = bits + 0xFFF + (bits >> 13 & 1);
    return sign | (u16)((rounded >> 13) - (112 << 10));
}
inline float from_f16(u16 x) {
    u32 size = x & 0x7FFF;
    float value;
    if (size >= 0x7C00) {
        value = size == 0x7C00 ? INFINITY : NAN;
    } else if (size < 0x400) {
        value = (float)size / 16777216.0f;
    } else {
        value = emulate::as_float((size << 13) + (112u << 23));
    }
    return x & 0x8000 ? -value : value;
}
inline u32 pack_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
inline u32 pack_f16(float low, float high) { return to_f16(low) | (u32)to_f16(high) << 16; }
inline float exp2_fast(float x) { return exp2f(x); }

// Warp-wide operations.

inline float shuffle_xor(float value, int mask) {
    u32 bits = emulate::as_bits(value);
    auto shown = emulate::show(&bits, 1);
    return emulate::as_float(shown[emulate::lane() ^ mask][0]);
}
inline u32 shuffle_xor(u32 value, int mask) {
    auto shown = emulate::show(&value, 1);
    return shown[emulate::lane() ^ mask][0];
}
inline u32 shuffle_up(u32 value, int distance) {
    auto shown = emulate::show(&value, 1);
    int from = (int)emulate::lane() - distance;
    return from < 0 ? value : shown[from][0];
}

/// `c += a × b` on 16 × 8 × 16 values; fragments lie over lanes as the PTX manual says.
template <float (*FROM)(u16)>
inline void emulated_mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    u32 words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    auto shown = emulate::show(words, 6);
    u32 group = emulate::lane() / 4, pair = emulate::lane() % 4;
    for (u32 i = 0; i < 4; ++i) {
        u32 row = group + i / 2 * 8, column = 2 * pair + i % 2;
        float sum = c[i];
        for (u32 k = 0; k < 16; ++k) {
            u32 a_word = shown[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            u32 b_word = shown[column * 4 + k % 8 / 2][4 + k / 8];
            u32 shift = k % 2 * 16;
            sum += FROM((u16)(a_word >> shift)) * FROM((u16)(b_word >> shift));
        }
        c[i] = sum;
    }
}
inline void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulated_mma<from_bf16>(c, a, b0, b1);
}
inline void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulated_mma<from_f16>(c, a, b0, b1);
}

/// Four 8 × 8 matrices of 16-bit values; lane `8i + r` names row `r` of matrix `i`.
inline void load_matrices(u32 (&to)[4], const void *row) {
    if ((uintptr_t)row % 16) emulate::fail("a matrix row is misaligned");
    u64 address = (uintptr_t)row;
    u32 words[2] = {(u32)address, (u32)(address >> 32)};
    auto shown = emulate::show(words, 2);
    u32 lane = emulate::lane();
    for (u32 i = 0; i < 4; ++i) {
        const u32 *of = shown[8 * i + lane / 4];
        memcpy(&to[i], (const char *)(uintptr_t)((u64)of[1] << 32 | of[0]) + lane % 4 * 4, 4);
    }
}
inline void load_matrices_turned(u32 (&to)[4], const void *row) {
    if ((uintptr_t)row % 16) emulate::fail("a matrix row is misaligned");
    u64 address = (uintptr_t)row;
    u32 words[2] = {(u32)address, (u32)(address >> 32)};
    auto shown = emulate::show(words, 2);
    u32 lane = emulate::lane();
    for (u32 i = 0; i < 4; ++i) {
        u16 values[2];
        for (u32 half = 0; half < 2; ++half) {
            const u32 *of = shown[8 * i + lane % 4 * 2 + half];
            const u16 *from = (const u16 *)(uintptr_t)((u64)of[1] << 32 | of[0]);
            values[half] = from[lane / 4];
        }
        to[i] = values[0] | (u32)values[1] << 16;
    }
}

inline u32 merge_bits(u32 x, u32 mask, u32 bits) { return (x & mask) | bits; }
inline u32 merge_absent_bits(u32 x, u32 mask, u32 bits) { return (~x & mask) | bits; }
inline u32 add_bf16(u32 x, u32 y) {
    float low = from_bf16((u16)x) + from_bf16((u16)y);
    return pack_bf16(low, from_bf16((u16)(x >> 16)) + from_bf16((u16)(y >> 16)));
}

/// 4, 8 or 16 bytes to shared memory, zeros unless `there`; done when waited for, not before.
template <int BYTES = 16>
inline void copy_async(void *to, const void *from, bool there) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "the instruction takes no others");
    if ((uintptr_t)to % BYTES || (uintptr_t)from % BYTES) emulate::fail("a copy is misaligned");
    emulate::begin_copy(to, there ? from : nullptr, BYTES);
}
inline void copy_commit() { emulate::commit_copies(); }
template <int PENDING>
inline void copy_wait() {
    emulate::finish_copies(PENDING);
}
