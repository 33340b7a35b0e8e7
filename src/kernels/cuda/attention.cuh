// Attention of 16 query rows of one KV head, by one warp: scores of 32 positions at a time by
// tensor cores, an online softmax in base 2, values by tensor cores. Query rows are packed: all
// heads that share a KV head stand side by side, so that keys and values are read once for them.
// Knows not where keys and values come from.
#pragma once

#include "common.cuh"

constexpr float UNSEEN = -INFINITY;

/// 16-bit numbers of one kind.
struct Halves {
    __device__ __forceinline__ static u32 pack(float x, float y) { return pack_f16(x, y); }
    __device__ __forceinline__ static void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        mma_f16(c, a, b0, b1);
    }
};
struct Brains {
    __device__ __forceinline__ static u32 pack(float x, float y) { return pack_bf16(x, y); }
    __device__ __forceinline__ static void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        mma_bf16(c, a, b0, b1);
    }
};

/// Where 16-byte piece `piece` of row `row` lies in a tile of rows of `WIDTH` 16-bit values. Eight
/// rows of one piece, which are loaded together, lie in different banks.
template <int WIDTH>
__device__ __forceinline__ u32 piece_place(u32 row, u32 piece) {
    u32 turn = WIDTH >= 64 ? row & 7 : row >> 1 & 3;
    return row * WIDTH * 2 + (piece ^ turn) * 16;
}

/// Rows of the query matrix that a lane holds parts of: `lane / 4`, and 8 more.
template <int SIZE, class Numbers>
struct Attention {
    u32 queries[SIZE / 16][4];
    float sums[SIZE / 8][4];
    float peak[2], total[2];

    /// Takes rows in. `row` and `column` say where a packed row's values are; there are `count`.
    template <class Place>
    __device__ __forceinline__ void start(const View &view, u32 size, u32 count, Place place) {
        u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int k = 0; k < SIZE / 16; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                u32 packed = g + i % 2 * 8, d = 16 * k + 2 * t + i / 2 * 8;
                queries[k][i] = 0;
                if (packed < count && d < size) {
                    uint2 at = place(packed);
                    float x = read(view, at.x, at.y + d), y = read(view, at.x, at.y + d + 1);
                    queries[k][i] = Numbers::pack(x, y);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < SIZE / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
        }
        for (int i = 0; i < 2; ++i) peak[i] = UNSEEN, total[i] = 0.0f;
    }

    /// Keys as `[dimension][32 positions]`.
    __device__ __forceinline__ void scores_by_dimension(const unsigned char *keys,
                                                        float (&scores)[4][4]) const {
        u32 lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < SIZE / 16; ++k) {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                u32 part[4], d = 16 * k + lane / 8 % 2 * 8 + lane % 8;
                load_matrices_turned(part, keys + piece_place<32>(d, 2 * pair + lane / 16));
                Numbers::mma(scores[2 * pair], queries[k], part[0], part[1]);
                Numbers::mma(scores[2 * pair + 1], queries[k], part[2], part[3]);
            }
        }
    }

    /// Keys as `[32 positions][dimension]`.
    __device__ __forceinline__ void scores_by_position(const unsigned char *keys,
                                                       float (&scores)[4][4]) const {
        u32 lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < SIZE / 16; ++k) {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                u32 part[4], position = 16 * pair + lane / 16 * 8 + lane % 8;
                u32 piece = 2 * k + lane / 8 % 2;
                load_matrices(part, keys + piece_place<SIZE>(position, piece));
                Numbers::mma(scores[2 * pair], queries[k], part[0], part[1]);
                Numbers::mma(scores[2 * pair + 1], queries[k], part[2], part[3]);
            }
        }
    }

    /// Adds 32 positions from `first` on. Row `lane / 4 + 8 i` sees positions below `visible[i]`;
    /// `scale` is in base 2. Values are `[32 positions][dimension]`, finite or zero.
    __device__ __forceinline__ void add(float (&scores)[4][4], const unsigned char *values,
                                        u32 first, const u32 (&visible)[2], float scale) {
        u32 lane = threadIdx.x % 32, t = lane % 4;
        float highest[2] = {peak[0], peak[1]};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                u32 position = first + 8 * n + 2 * t + i % 2;
                bool seen = position < visible[i / 2];
                scores[n][i] = seen ? scores[n][i] * scale : UNSEEN;
                highest[i / 2] = fmaxf(highest[i / 2], scores[n][i]);
            }
        }
        float rescale[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            highest[i] = fmaxf(highest[i], shuffle_xor(highest[i], 1));
            highest[i] = fmaxf(highest[i], shuffle_xor(highest[i], 2));
            // A row that has seen nothing yet: any finite peak will do.
            float base = highest[i] == UNSEEN ? 0.0f : highest[i];
            rescale[i] = exp2_fast(peak[i] - base);
            peak[i] = highest[i];
            highest[i] = base;
            total[i] *= rescale[i];
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[n][i] = exp2_fast(scores[n][i] - highest[i / 2]);
                total[i / 2] += scores[n][i];
            }
        }
#pragma unroll
        for (int n = 0; n < SIZE / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] *= rescale[i / 2];
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            u32 weights[4] = {Numbers::pack(scores[2 * k][0], scores[2 * k][1]),
                              Numbers::pack(scores[2 * k][2], scores[2 * k][3]),
                              Numbers::pack(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                              Numbers::pack(scores[2 * k + 1][2], scores[2 * k + 1][3])};
            u32 position = 16 * k + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
            for (int n = 0; n < SIZE / 16; ++n) {
                u32 part[4];
                load_matrices_turned(part, values + piece_place<SIZE>(position, 2 * n + lane / 16));
                Numbers::mma(sums[2 * n], weights, part[0], part[1]);
                Numbers::mma(sums[2 * n + 1], weights, part[2], part[3]);
            }
        }
    }

    /// The sums of weights of whole rows.
    __device__ __forceinline__ void finish() {
        for (int i = 0; i < 2; ++i) {
            total[i] += shuffle_xor(total[i], 1);
            total[i] += shuffle_xor(total[i], 2);
        }
    }
};
