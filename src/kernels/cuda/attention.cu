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

/// The 16-byte pieces that one of `THREADS` threads copies to a tile of 32 rows: one of each
/// `EACH`th row.
template <int SIZE, int THREADS>
struct Pieces {
    static constexpr int OF_ROW = SIZE / 8, EACH = THREADS / OF_ROW, COUNT = BLOCK_TOKENS / EACH;
    // Then adding a power of two to the row changes other bits than the row has.
    static_assert(SIZE >= 64 || EACH % 8 == 0, "`place` turns what `piece_place` has turned");
    u32 row, piece, first;

    __device__ __forceinline__ explicit Pieces(u32 thread)
        : row(thread / OF_ROW), piece(thread % OF_ROW), first(piece_place<SIZE>(row, piece)) {}

    /// Where in the tile number `i` lies.
    __device__ __forceinline__ u32 place(int i) const {
        return (first ^ EACH * i % 8 * 16) + EACH * i * SIZE * 2;
    }
};

/// Starts to copy keys and values of one block of a KV head, by `THREADS` threads of which this is
/// `thread`. Values from position `there` on become zero: what lies there may be infinite.
template <int SIZE, int THREADS>
__device__ __forceinline__ void load_block(unsigned char *to, const u16 *block, const Cache &cache,
                                           u32 head, u32 there, u32 thread) {
    const u16 *keys = block + (u64)head * cache.head_dim * BLOCK_TOKENS;
    const u16 *values = keys + (u64)cache.heads * cache.head_dim * BLOCK_TOKENS;
    Pieces<BLOCK_TOKENS, THREADS> key(thread);
#pragma unroll
    for (int i = 0; i < SIZE * 4 / THREADS; ++i) {
        bool inside = key.row + key.EACH * i < cache.head_dim;
        const u16 *from = keys + (inside ? (thread + THREADS * i) * 8 : 0);
        copy_async(to + key.place(i), from, inside);
    }
    Pieces<SIZE, THREADS> value(thread);
    bool within = value.piece * 8 < cache.head_dim;
    values += value.piece * 8;
#pragma unroll
    for (int i = 0; i < value.COUNT; ++i) {
        u32 position = value.row + value.EACH * i;
        bool inside = within && position < there;
        const u16 *from = inside ? values + position * cache.head_dim : keys;
        copy_async(to + SIZE * 64 + value.place(i), from, inside);
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
        load_block<SIZE, 32>(memory, block, a.cache, head, there, lane);
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

    __device__ __forceinline__ Paged(const AttentionArgs &args, const Span &of, u32 kv_head)
        : a(args), span(of), head(kv_head) {}
    __device__ __forceinline__ u32 group() const { return a.heads / a.cache.heads; }
    __device__ __forceinline__ u32 visible(u32 row) const { return span.start + row + 1; }
    __device__ __forceinline__ void load(unsigned char *to, u32 index, u32 end) const {
        const u16 *block = cache_block(a.cache, a.step, span.blocks, index);
        load_block<SIZE, ATTENTION_THREADS>(to, block, a.cache, head, end - index * BLOCK_TOKENS,
                                            threadIdx.x);
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
    Pieces<SIZE, ATTENTION_THREADS> pieces;
    /// This thread's first piece of keys.
    const u16 *keys;

    __device__ __forceinline__ Packed(const AttentionArgs &args, const Span &of, u32 kv_head)
        : a(args), span(of), head(kv_head), pieces(threadIdx.x) {
        u32 column = (a.heads + head) * a.cache.head_dim + pieces.piece * 8;
        keys = (const u16 *)a.qkv.data + (u64)(span.first + pieces.row) * a.qkv.stride + column;
    }
    __device__ __forceinline__ u32 group() const { return a.heads / a.cache.heads; }
    __device__ __forceinline__ u32 visible(u32 row) const {
        return a.causal ? row + 1 : span.rows;
    }
    __device__ __forceinline__ void load(unsigned char *to, u32 index, u32 end) const {
        const u16 *from = keys + (u64)index * BLOCK_TOKENS * a.qkv.stride;
        u32 position = index * BLOCK_TOKENS + pieces.row;
        bool within = pieces.piece * 8 < a.cache.head_dim;
        u32 apart = a.cache.heads * a.cache.head_dim;
#pragma unroll
        for (int i = 0; i < pieces.COUNT; ++i) {
            bool inside = within && position + pieces.EACH * i < end;
            const u16 *key = inside ? from : (const u16 *)a.qkv.data;
            copy_async(to + pieces.place(i), key, inside);
            copy_async(to + SIZE * 64 + pieces.place(i), key + (inside ? apart : 0), inside);
            from += pieces.EACH * a.qkv.stride;
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
    Source source(a, span, blockIdx.y);
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
