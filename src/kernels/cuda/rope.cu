// Rotary positions, and keys and values on their way into KV blocks.
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

struct RopeStoreArgs {
    const Step *step;
    View qkv;
    Cache cache;
    const float *table;  // cosines, then sines, of each position
    u32 heads;
    u32 positions;  // in the table
};

/// A block a row and head: query heads, then key heads, then value heads.
extern "C" __global__ void __launch_bounds__(ROPE_THREADS)
rope_store(const __grid_constant__ RopeStoreArgs a) {
    u32 row = blockIdx.x, head = blockIdx.y;
    if (row >= a.step->rows) return;
    u32 size = a.cache.head_dim, half = size / 2;
    u32 position = a.step->positions[row], column = head * size;
    const float *angles = a.table + (u64)min(position, a.positions - 1) * size;
    Span span = a.step->span[a.step->span_of[row]];
    u16 *block = cache_block(a.cache, a.step, span.blocks, position / BLOCK_TOKENS);
    u32 token = position % BLOCK_TOKENS;
    if (head >= a.heads + a.cache.heads) {
        u32 value_head = head - a.heads - a.cache.heads;
        u16 *to = block + (u64)(a.cache.heads + value_head) * size * BLOCK_TOKENS + token * size;
        for (u32 i = threadIdx.x; i < size; i += ROPE_THREADS) {
            to[i] = to_f16(read(a.qkv, row, column + i));
        }
        return;
    }
    for (u32 i = threadIdx.x; i < half; i += ROPE_THREADS) {
        float x = read(a.qkv, row, column + i), y = read(a.qkv, row, column + half + i);
        float cosine = angles[i], sine = angles[half + i];
        float turned_x = x * cosine - y * sine, turned_y = y * cosine + x * sine;
        if (head < a.heads) {
            write(a.qkv, row, column + i, turned_x);
            write(a.qkv, row, column + half + i, turned_y);
        } else {
            u16 *to = block + (u64)(head - a.heads) * size * BLOCK_TOKENS + token;
            to[i * BLOCK_TOKENS] = to_f16(turned_x);
            to[(half + i) * BLOCK_TOKENS] = to_f16(turned_y);
        }
    }
}
