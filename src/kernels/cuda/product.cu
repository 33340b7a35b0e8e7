// The tiled product of many rows with a bf16 matrix: 128 rows × 128 outputs a block, 32 inputs at
// a time, three steps ahead in shared memory; eight warps of 64 × 32 each. Two such blocks share a
// processor: one with 256 outputs fills it alone, and was slower (H200, 2026-11).
#include "common.cuh"

constexpr int PRODUCT_TILE = 128, PRODUCT_STEP = 32, PRODUCT_STAGES = 3;
constexpr int PRODUCT_THREADS = 256;

/// Bytes of one stage: rows, then outputs, of 32 values.
constexpr int PRODUCT_STAGE_BYTES = 2 * PRODUCT_TILE * PRODUCT_STEP * 2;

/// Where 16-byte piece `piece` of row `row` lies in a tile: eight rows of one piece, which are
/// loaded together, must lie in different banks.
__device__ __forceinline__ u32 tile_place(u32 row, u32 piece) {
    return row * 64 + (piece ^ (row >> 1 & 3)) * 16;
}

/// Starts to copy one step's tiles.
__device__ __forceinline__ void load_tiles(const LinearArgs &a, unsigned char *stage, u32 rows,
                                           u32 step) {
    u32 first_row = blockIdx.y * PRODUCT_TILE, first_output = blockIdx.x * PRODUCT_TILE;
    u32 inputs = a.weight.supers * SUPER;
    for (u32 i = threadIdx.x; i < PRODUCT_TILE * 4; i += PRODUCT_THREADS) {
        u32 line = i / 4, piece = i % 4, column = step * PRODUCT_STEP + piece * 8;
        u32 row = first_row + line, output = first_output + line;
        bool there = row < rows;
        const u16 *x = a.input + (there ? (u64)row * a.stride + column : 0);
        copy_async(stage + tile_place(line, piece), x, there);
        there = output < a.weight.outputs;
        const u16 *w = (const u16 *)a.weight.values + (there ? (u64)output * inputs + column : 0);
        copy_async(stage + PRODUCT_TILE * 64 + tile_place(line, piece), w, there);
    }
}

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)
product_bf16(const __grid_constant__ LinearArgs a) {
    SHARED_MEMORY(shared);
    begin();
    u32 rows = row_count(a.step, a.gathered);
    if (blockIdx.y * PRODUCT_TILE >= rows) return;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 warp_row = warp / 4 * 64, warp_output = warp % 4 * 32;
    u32 steps = (a.weight.inputs + PRODUCT_STEP - 1) / PRODUCT_STEP;
    float sums[4][4][4] = {};
    for (u32 s = 0; s < PRODUCT_STAGES - 1; ++s) {
        if (s < steps) load_tiles(a, shared + s * PRODUCT_STAGE_BYTES, rows, s);
        copy_commit();
    }
    for (u32 s = 0; s < steps; ++s) {
        copy_wait<PRODUCT_STAGES - 2>();
        __syncthreads();
        u32 ahead = s + PRODUCT_STAGES - 1;
        if (ahead < steps) {
            load_tiles(a, shared + ahead % PRODUCT_STAGES * PRODUCT_STAGE_BYTES, rows, ahead);
        }
        copy_commit();
        const unsigned char *x = shared + s % PRODUCT_STAGES * PRODUCT_STAGE_BYTES;
        const unsigned char *w = x + PRODUCT_TILE * 64;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 left[4][4], right[2][4];
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                u32 row = warp_row + 16 * m + lane % 16;
                load_matrices(left[m], x + tile_place(row, 2 * half + lane / 16));
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                // Matrices: outputs 0-7 and inputs 0-7, 0-7 and 8-15, 8-15 and 0-7, 8-15 both.
                u32 output = warp_output + 16 * n + lane / 16 * 8 + lane % 8;
                load_matrices(right[n], w + tile_place(output, 2 * half + lane / 8 % 2));
            }
#pragma unroll
            for (int m = 0; m < 4; ++m) {
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    mma_bf16(sums[m][n], left[m], right[n / 2][n % 2 * 2],
                             right[n / 2][n % 2 * 2 + 1]);
                }
            }
        }
    }
    u32 first_row = blockIdx.y * PRODUCT_TILE + warp_row;
    u32 first_output = blockIdx.x * PRODUCT_TILE + warp_output;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u32 row = first_row + 16 * m + lane / 4 + i * 8;
                u32 output = first_output + 8 * n + lane % 4 * 2;
                if (row < rows && output < a.weight.outputs) {
                    finish_pair(a, row, output, sums[m][n][2 * i], sums[m][n][2 * i + 1]);
                }
            }
        }
    }
}
