// What all kernels share: what they read of a step, how buffers look, sums over a warp and a
// block. The structs are those of `arguments.rs`.
#pragma once

#ifdef SCONCE_EMULATE
#include "emulate.h"
#else
#include "intrinsics.cuh"
#endif

/// Positions in a KV block.
constexpr u32 BLOCK_TOKENS = 32;

/// A sequence's rows in a step: `[first, first + rows)`, of which the first is at position
/// `start`; its blocks are `[blocks, blocks + ...)` of the step's table.
struct Span {
    u32 first, rows, start, blocks;
};

/// Some query rows of a span: from packed row `from` on (row × heads of a group + head).
struct Tile {
    u32 span, from;
};

/// One token to be chosen.
struct Draw {
    u32 row;  // of the logits
    u32 seat;
    u32 position, choice;
    u32 seed_low, seed_high;
    float temperature, top_p, min_p;
    u32 top_k;
};

/// A super-page that a group got, in one layer.
struct Loan {
    u32 place;  // group × layers + layer
    u32 page;
};

/// A block that is copied to another before the rows, in all layers.
struct BlockCopy {
    uint2 from, to;  // group, slot
};

/// The step: counts, then tables in device memory.
struct Step {
    u32 rows, spans, gathered, draws;
    u32 small_tiles, large_tiles, loans, copies;
    u32 *tokens;  // with the highest bit set: from a seat, until `embed` has looked there
    const u32 *positions;
    const u32 *span_of;
    const u32 *gather;
    const Span *span;
    const uint2 *blocks;  // group, slot
    const Tile *small;    // at most 16 packed rows each
    const Tile *large;    // at most 64
    const Draw *draw;
    const Loan *loan;
    const u32 *types;  // of tokens, or null: all 0
    const BlockCopy *copy;
};

constexpr u32 FROM_SEAT = 1u << 31;

/// Rows of f32 or bf16 values; `stride` values from row to row.
struct View {
    void *data;
    u32 stride;
    u32 half;  // whether values are bf16
};

__device__ __forceinline__ float read(const View &view, u32 row, u32 column) {
    u64 at = (u64)row * view.stride + column;
    return view.half ? from_bf16(((const u16 *)view.data)[at]) : ((const float *)view.data)[at];
}

__device__ __forceinline__ void write(const View &view, u32 row, u32 column, float value) {
    u64 at = (u64)row * view.stride + column;
    if (view.half) {
        ((u16 *)view.data)[at] = to_bf16(value);
    } else {
        ((float *)view.data)[at] = value;
    }
}

/// How a weight matrix is stored; see `matrices.rs`.
constexpr u32 MATRIX_BF16 = 0, MATRIX_4_BITS = 1, MATRIX_8_BITS = 2;
/// Groups have minimums; halves of groups have scales of their own.
constexpr u32 MATRIX_MINIMUM = 4, MATRIX_HALVES = 8;

/// Inputs that a matrix is padded to a multiple of.
constexpr u32 SUPER = 128;

struct Matrix {
    const void *values;
    const void *scales;
    u32 format;
    u32 outputs, inputs;
    u32 supers;  // inputs / 128, rounded up
};

__device__ __forceinline__ float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

/// The sum over all threads of a block of `THREADS`, in every thread. `scratch` holds a value for
/// each warp; it can be used again after the next barrier.
template <int THREADS>
__device__ __forceinline__ float block_sum(float x, float *scratch) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < THREADS / 32; ++warp) sum += scratch[warp];
    return sum;
}

__device__ __forceinline__ u64 shuffle_xor_wide(u64 x, int mask) {
    u32 low = shuffle_xor((u32)x, mask), high = shuffle_xor((u32)(x >> 32), mask);
    return (u64)high << 32 | low;
}

__device__ __forceinline__ float silu_times(float gate, float up) {
    return gate / (1.0f + __expf(-gate)) * up;
}

/// Which rows an op works on.
__device__ __forceinline__ u32 row_count(const Step *step, u32 gathered) {
    return gathered ? step->gathered : step->rows;
}
