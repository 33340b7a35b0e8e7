// Paged attention for one row a sequence (split over the sequence, merged afterwards) and for many
// rows, and attention within packed spans.
#include "attention.cuh"

constexpr int ATTENTION_WARPS = 4;
constexpr int ATTENTION_THREADS = 32 * ATTENTION_WARPS;
constexpr float LOG2_E = 1.44269504f;

/// A sequence is split among at most so many blocks, of at least so many KV blocks each. The split
/// depends on its length alone, so that a row's sum does not depend on its company.
constexpr u32 SPLITS_MAX = 16, SPLIT_BLOCKS = 8;

struct AttentionArgs {
    const Step *step;
    View qkv, output;
    Cache cache;
    float *parts;   // of splits: sums, `head_dim` for each split row
    float *limits;  // peak and total of each split row
    u32 heads;
    float scale;
    u32 causal;  // of packed spans: rows see none after themselves
    u32 unused;
};

struct Split {
    u32 first, end, count;
};

__device__ __forceinline__ Split split_of(u32 length, u32 index) {
    u32 blocks = (length + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    u32 count = min(SPLITS_MAX, (blocks + SPLIT_BLOCKS - 1) / SPLIT_BLOCKS);
    u32 each = (blocks + count - 1) / count;
    // Rounded up, fewer may do: none is empty, for it would have no peak to be weighed by.
    count = (blocks + each - 1) / each;
    return {min(index * each, blocks), min((index + 1) * each, blocks), count};
}

/// Starts to copy keys and values of one block of a KV head, with `threads` threads of which this
/// is `thread`. Values from position `there` on become zero: what lies there may be infinite.
template <int SIZE>
__device__ __forceinline__ void load_block(unsigned char *to, const u16 *block, const Cache &cache,
                                           u32 head, u32 there, u32 thread, u32 threads) {
    const u16 *keys = block + (u64)head * cache.head_dim * BLOCK_TOKENS;
    const u16 *values = keys + (u64)cache.heads * cache.head_dim * BLOCK_TOKENS;
    for (u32 i = thread; i < SIZE * 4; i += threads) {
        u32 d = i / 4, piece = i % 4;
        bool inside = d < cache.head_dim;
        copy_async(to + piece_place<32>(d, piece), keys + (inside ? i * 8 : 0), inside);
    }
    unsigned char *second = to + SIZE * 64;
    for (u32 i = thread; i < BLOCK_TOKENS * (SIZE / 8); i += threads) {
        u32 position = i / (SIZE / 8), piece = i % (SIZE / 8);
        bool inside = position < there && piece * 8 < cache.head_dim;
        const u16 *from = values + (inside ? position * cache.head_dim + piece * 8 : 0);
        copy_async(second + piece_place<SIZE>(position, piece), from, inside);
    }
}

/// One row of a sequence, up to 16 of the heads that share a KV head, and one split; each warp
/// takes every fourth KV block. Grid: splits, KV heads, tiles.
template <int SIZE, int WARPS>
__device__ __forceinline__ void attend_small(const AttentionArgs &a) {
    SHARED_MEMORY(shared);
    begin();
    if (blockIdx.z >= a.step->small_tiles) return;
    Tile tile = a.step->small[blockIdx.z];
    Span span = a.step->span[tile.span];
    u32 length = span.start + 1, size = a.cache.head_dim;
    Split split = split_of(length, blockIdx.x);
    if (blockIdx.x >= split.count) return;
    u32 group = a.heads / a.cache.heads, head = blockIdx.y;
    u32 first_head = head * group + tile.from, count = min(16, group - tile.from);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    unsigned char *memory = shared + warp * SIZE * 128;
    const u32 visible[2] = {length, length};
    // Each of a few blocks is a chain of look-ups: the first is on its way while queries are read,
    // and where the next lies is known before it is asked for.
    auto start_block = [&](const u16 *block, u32 index) {
        u32 there = length - index * BLOCK_TOKENS;
        load_block<SIZE>(memory, block, a.cache, head, there, lane, 32);
        copy_commit();
    };
    u32 own = split.first + warp;
    if (own < split.end) start_block(cache_block(a.cache, a.step, span.blocks, own), own);
    Attention<SIZE, Halves> attention;
    attention.start(a.qkv, size, count, [&](u32 packed) {
        return uint2{span.first, (first_head + packed) * size};
    });
    for (u32 index = own; index < split.end; index += WARPS) {
        u32 first = index * BLOCK_TOKENS, after = index + WARPS;
        const u16 *next = nullptr;
        if (after < split.end) next = cache_block(a.cache, a.step, span.blocks, after);
        copy_wait<0>();
        __syncwarp();
        float scores[4][4] = {};
        attention.scores_by_dimension(memory, scores);
        attention.add(scores, memory + SIZE * 64, first, visible, a.scale * LOG2_E);
        __syncwarp();
        if (after < split.end) start_block(next, after);
    }
    attention.finish();

    // All warps have left their tiles: the memory is used again, for their sums.
    __syncthreads();
    float *sums = (float *)shared;
    float *limits = sums + WARPS * 16 * SIZE;
    u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < SIZE / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 row = g + i / 2 * 8, d = 8 * n + 2 * t + i % 2;
            sums[(warp * 16 + row) * SIZE + d] = attention.sums[n][i];
        }
    }
    if (t == 0) {
        for (int i = 0; i < 2; ++i) {
            limits[(warp * 16 + g + 8 * i) * 2] = attention.peak[i];
            limits[(warp * 16 + g + 8 * i) * 2 + 1] = attention.total[i];
        }
    }
    __syncthreads();
    u32 together = min(16, group);
    u64 cells = (((u64)blockIdx.z * a.cache.heads + head) * SPLITS_MAX + blockIdx.x) * together;
    for (u32 i = threadIdx.x; i < count * size; i += 32 * WARPS) {
        u32 row = i / size, d = i % size;
        float peak = UNSEEN, total = 0.0f, sum = 0.0f;
        for (int w = 0; w < WARPS; ++w) peak = fmaxf(peak, limits[(w * 16 + row) * 2]);
        for (int w = 0; w < WARPS; ++w) {
            float weight = exp2_fast(limits[(w * 16 + row) * 2] - peak);
            total += weight * limits[(w * 16 + row) * 2 + 1];
            sum += weight * sums[(w * 16 + row) * SIZE + d];
        }
        if (split.count == 1) {
            write(a.output, span.first, (first_head + row) * size + d, sum / total);
            continue;
        }
        a.parts[(cells + row) * size + d] = sum;
        if (d == 0) {
            a.limits[(cells + row) * 2] = peak;
            a.limits[(cells + row) * 2 + 1] = total;
        }
    }
}

/// Adds up splits. Grid: KV heads, tiles.
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
attend_merge(const __grid_constant__ AttentionArgs a) {
    begin();
    if (blockIdx.y >= a.step->small_tiles) return;
    Tile tile = a.step->small[blockIdx.y];
    Span span = a.step->span[tile.span];
    Split split = split_of(span.start + 1, 0);
    if (split.count == 1) return;
    u32 group = a.heads / a.cache.heads, head = blockIdx.x, size = a.cache.head_dim;
    u32 first_head = head * group + tile.from, count = min(16, group - tile.from);
    u32 together = min(16, group);
    u64 cells = ((u64)blockIdx.y * a.cache.heads + head) * SPLITS_MAX * together;
    for (u32 i = threadIdx.x; i < count * size; i += ATTENTION_THREADS) {
        u32 row = i / size, d = i % size;
        float peak = UNSEEN, total = 0.0f, sum = 0.0f;
        for (u32 s = 0; s < split.count; ++s) {
            peak = fmaxf(peak, a.limits[(cells + s * together + row) * 2]);
        }
        for (u32 s = 0; s < split.count; ++s) {
            u64 cell = cells + s * together + row;
            float weight = exp2_fast(a.limits[cell * 2] - peak);
            total += weight * a.limits[cell * 2 + 1];
            sum += weight * a.parts[cell * size + d];
        }
        write(a.output, span.first, (first_head + row) * size + d, sum / total);
    }
}

/// Keys and values of a sequence's KV blocks.
template <int SIZE>
struct Paged {
    using Numbers = Halves;
    const AttentionArgs &a;
    Span span;
    u32 head;

    __device__ __forceinline__ u32 group() const { return a.heads / a.cache.heads; }
    __device__ __forceinline__ u32 visible(u32 row) const { return span.start + row + 1; }
    __device__ __forceinline__ void load(unsigned char *to, u32 index, u32 end) const {
        const u16 *block = cache_block(a.cache, a.step, span.blocks, index);
        load_block<SIZE>(to, block, a.cache, head, end - index * BLOCK_TOKENS, threadIdx.x,
                         ATTENTION_THREADS);
    }
    template <class A>
    __device__ __forceinline__ void scores(const A &attention, const unsigned char *keys,
                                           float (&scores)[4][4]) const {
        attention.scores_by_dimension(keys, scores);
    }
};

/// Keys and values of the step's own rows.
template <int SIZE>
struct Packed {
    using Numbers = Brains;
    const AttentionArgs &a;
    Span span;
    u32 head;

    __device__ __forceinline__ u32 group() const { return a.heads / a.cache.heads; }
    __device__ __forceinline__ u32 visible(u32 row) const {
        return a.causal ? row + 1 : span.rows;
    }
    __device__ __forceinline__ void load(unsigned char *to, u32 index, u32 end) const {
        u32 size = a.cache.head_dim;
        for (u32 i = threadIdx.x; i < 2 * BLOCK_TOKENS * (SIZE / 8); i += ATTENTION_THREADS) {
            u32 part = i / (BLOCK_TOKENS * (SIZE / 8));
            u32 row = i / (SIZE / 8) % BLOCK_TOKENS, piece = i % (SIZE / 8);
            u32 position = index * BLOCK_TOKENS + row;
            bool inside = position < end && piece * 8 < size;
            u32 column = (a.heads + part * a.cache.heads + head) * size + piece * 8;
            u64 at = inside ? (u64)(span.first + position) * a.qkv.stride + column : 0;
            copy_async(to + part * SIZE * 64 + piece_place<SIZE>(row, piece),
                       (const u16 *)a.qkv.data + at, inside);
        }
    }
    template <class A>
    __device__ __forceinline__ void scores(const A &attention, const unsigned char *keys,
                                           float (&scores)[4][4]) const {
        attention.scores_by_position(keys, scores);
    }
};

/// 64 packed rows of a span: 16 a warp, all of which read the same keys and values.
template <int SIZE, class Source>
__device__ __forceinline__ void attend_large(const AttentionArgs &a) {
    SHARED_MEMORY(shared);
    begin();
    if (blockIdx.x >= a.step->large_tiles) return;
    Tile tile = a.step->large[blockIdx.x];
    Span span = a.step->span[tile.span];
    Source source{a, span, blockIdx.y};
    u32 group = source.group(), size = a.cache.head_dim;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 packed_rows = span.rows * group;
    u32 from = tile.from + 16 * warp;
    u32 count = from < packed_rows ? min(16, packed_rows - from) : 0;
    auto place = [&](u32 packed) {
        u32 head = source.head * group + (from + packed) % group;
        return uint2{span.first + (from + packed) / group, head * size};
    };
    Attention<SIZE, typename Source::Numbers> attention;
    attention.start(a.qkv, size, count, place);
    u32 visible[2];
    for (int i = 0; i < 2; ++i) {
        u32 packed = from + g + 8 * i;
        visible[i] = packed < packed_rows ? source.visible(packed / group) : 0;
    }
    u32 last = min(tile.from + 16 * ATTENTION_WARPS, packed_rows) - 1;
    u32 end = source.visible(last / group);
    u32 warp_end = count > 0 ? source.visible((from + count - 1) / group) : 0;
    u32 blocks = (end + BLOCK_TOKENS - 1) / BLOCK_TOKENS;

    source.load(shared, 0, end);
    copy_commit();
    for (u32 index = 0; index < blocks; ++index) {
        unsigned char *now = shared + index % 2 * SIZE * 128;
        if (index + 1 < blocks) source.load(shared + (index + 1) % 2 * SIZE * 128, index + 1, end);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        u32 first = index * BLOCK_TOKENS;
        if (first < warp_end) {
            float scores[4][4] = {};
            source.scores(attention, now, scores);
            attention.add(scores, now + SIZE * 64, first, visible, a.scale * LOG2_E);
        }
        __syncthreads();
    }
    attention.finish();
#pragma unroll
    for (int n = 0; n < SIZE / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 packed = g + i / 2 * 8, d = 8 * n + 2 * t + i % 2;
            if (packed < count && d < size) {
                uint2 at = place(packed);
                write(a.output, at.x, at.y + d, attention.sums[n][i] / attention.total[i / 2]);
            }
        }
    }
}

#define ATTEND(SIZE, WARPS)                                                 \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                \
    attend_small_##SIZE(const __grid_constant__ AttentionArgs a) {          \
        attend_small<SIZE, WARPS>(a);                                       \
    }                                                                       \
    extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)         \
    attend_large_##SIZE(const __grid_constant__ AttentionArgs a) {          \
        attend_large<SIZE, Paged<SIZE>>(a);                                 \
    }                                                                       \
    extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)         \
    attend_packed_##SIZE(const __grid_constant__ AttentionArgs a) {         \
        attend_large<SIZE, Packed<SIZE>>(a);                                \
    }

ATTEND(32, 4)
ATTEND(64, 4)
ATTEND(128, 4)
ATTEND(256, 2)

#undef ATTEND
