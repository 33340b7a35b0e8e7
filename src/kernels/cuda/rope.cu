// Norms of heads, rotary positions, and keys and values on their way into KV blocks.
#include "common.cuh"

constexpr int ROPE_THREADS = 128;

/// Where a lane's KV blocks lie in one layer, and how a block looks: K is
/// `[heads][head_dim][32]`, V is `[heads][32][head_dim]`, both f16.
struct Cache {
    unsigned char *region;
    const u64 *pages;  // by group and layer
    u32 layers, layer;
    u32 heads, head_dim;
};

/// The block that holds positions `32 index ..` of a span.
__device__ __forceinline__ u16 *cache_block(const Cache &c, const Step *step, u32 first,
                                            u32 index) {
    uint2 block = step->blocks[first + index];
    u64 bytes = (u64)4 * c.heads * c.head_dim * BLOCK_TOKENS;
    u64 page = c.pages[(u64)block.x * c.layers + c.layer];
    return (u16 *)(c.region + page + block.y * bytes);
}

struct RopeArgs {
    const Step *step;
    View qkv;
    Cache cache;         // without a region keys and values stay where they are
    const float *table;  // cosines, then sines, of each position
    const float *query_norm, *key_norm;  // scales, or null: heads are not normalised first
    u32 heads;
    u32 positions;  // in the table
    float eps;
    u32 unused;
};

/// A block a row and head: query heads, then key heads, then value heads. A thread has a pair, for
/// heads have at most 256 values.
extern "C" __global__ void __launch_bounds__(ROPE_THREADS)
rope(const __grid_constant__ RopeArgs a) {
    begin();
    SHARED_MEMORY(shared);
    u32 row = blockIdx.x, head = blockIdx.y;
    if (row >= a.step->rows) return;
    u32 size = a.cache.head_dim, half = size / 2, i = threadIdx.x;
    u32 position = a.step->positions[row], column = head * size, token = position % BLOCK_TOKENS;
    float x = 0.0f, y = 0.0f, cosine = 0.0f, sine = 0.0f;
    if (i < half) {
        const float *angles = a.table + (u64)min(position, a.positions - 1) * size;
        x = read(a.qkv, row, column + i), y = read(a.qkv, row, column + half + i);
        cosine = angles[i], sine = angles[half + i];
    }
    u16 *block = nullptr;
    if (a.cache.region) {
        Span span = a.step->span[a.step->span_of[row]];
        block = cache_block(a.cache, a.step, span.blocks, position / BLOCK_TOKENS);
    }
    if (head >= a.heads + a.cache.heads) {
        if (!block || i >= half) return;
        u32 value_head = head - a.heads - a.cache.heads;
        u16 *to = block + (u64)(a.cache.heads + value_head) * size * BLOCK_TOKENS + token * size;
        to[i] = to_f16(x);
        to[half + i] = to_f16(y);
        return;
    }
    const float *norm = head < a.heads ? a.query_norm : a.key_norm;
    if (norm) {
        float squares = block_sum<ROPE_THREADS>(x * x + y * y, (float *)shared);
        float inverse = rsqrtf(squares / (float)size + a.eps);
        if (i < half) x *= inverse * norm[i], y *= inverse * norm[half + i];
    }
    if (i >= half) return;
    float turned_x = x * cosine - y * sine, turned_y = y * cosine + x * sine;
    if (head < a.heads || !block) {
        write(a.qkv, row, column + i, turned_x);
        write(a.qkv, row, column + half + i, turned_y);
    } else {
        u16 *to = block + (u64)(head - a.heads) * size * BLOCK_TOKENS + token;
        to[i * BLOCK_TOKENS] = to_f16(turned_x);
        to[(half + i) * BLOCK_TOKENS] = to_f16(turned_y);
    }
}
