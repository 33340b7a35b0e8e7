// The tiled product of many rows with a bf16 matrix: 128 rows and 128 or 256 outputs a block, 32
// inputs at a time, four steps ahead in shared memory; eight warps of 64 rows each.
#include "common.cuh"

constexpr int PRODUCT_ROWS = 128, PRODUCT_STEP = 32, PRODUCT_STAGES = 4;
constexpr int PRODUCT_THREADS = 256;

/// Where 16-byte piece `piece` of row `row` lies in a tile: eight rows of one piece, which are
/// loaded together, must lie in different banks.
__device__ __forceinline__ u32 tile_place(u32 row, u32 piece) {
    return row * 64 + (piece ^ (row >> 1 & 3)) * 16;
}

/// Starts to copy one step's tiles: rows, then outputs, of 32 values.
template <int OUTPUTS>
__device__ __forceinline__ void load_tiles(const LinearArgs &a, unsigned char *stage, u32 rows,
                                           u32 step) {
    u32 inputs = a.weight.supers * SUPER;
#pragma unroll
    for (u32 i = threadIdx.x; i < PRODUCT_ROWS * 4; i += PRODUCT_THREADS) {
        u32 line = i / 4, piece = i % 4, column = step * PRODUCT_STEP + piece * 8;
        u32 row = blockIdx.y * PRODUCT_ROWS + line;
        bool there = row < rows;
        const u16 *x = a.input + (there ? (u64)row * a.stride + column : 0);
        copy_async(stage + tile_place(line, piece), x, there);
    }
#pragma unroll
    for (u32 i = threadIdx.x; i < OUTPUTS * 4; i += PRODUCT_THREADS) {
        u32 line = i / 4, piece = i % 4, column = step * PRODUCT_STEP + piece * 8;
        u32 output = blockIdx.x * OUTPUTS + line;
        bool there = output < a.weight.outputs;
        const u16 *w = (const u16 *)a.weight.values + (there ? (u64)output * inputs + column : 0);
        copy_async(stage + PRODUCT_ROWS * 64 + tile_place(line, piece), w, there);
    }
}

template <int OUTPUTS>
__device__ __forceinline__ void product(const LinearArgs &a) {
    SHARED_MEMORY(shared);
    begin();
    u32 rows = row_count(a.step, a.gathered);
    if (blockIdx.y * PRODUCT_ROWS >= rows) return;
    // 16-wide pieces of a warp's outputs.
    constexpr int PAIRS = OUTPUTS / 64, STAGE_BYTES = (PRODUCT_ROWS + OUTPUTS) * PRODUCT_STEP * 2;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 warp_row = warp / 4 * 64, warp_output = warp % 4 * 16 * PAIRS;
    u32 steps = (a.weight.inputs + PRODUCT_STEP - 1) / PRODUCT_STEP;
    float sums[4][2 * PAIRS][4] = {};
    for (u32 s = 0; s < PRODUCT_STAGES - 1; ++s) {
        if (s < steps) load_tiles<OUTPUTS>(a, shared + s * STAGE_BYTES, rows, s);
        copy_commit();
    }
    for (u32 s = 0; s < steps; ++s) {
        copy_wait<PRODUCT_STAGES - 2>();
        __syncthreads();
        u32 ahead = s + PRODUCT_STAGES - 1;
        if (ahead < steps) {
            load_tiles<OUTPUTS>(a, shared + ahead % PRODUCT_STAGES * STAGE_BYTES, rows, ahead);
        }
        copy_commit();
        const unsigned char *x = shared + s % PRODUCT_STAGES * STAGE_BYTES;
        const unsigned char *w = x + PRODUCT_ROWS * 64;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 left[4][4], right[PAIRS][4];
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                u32 row = warp_row + 16 * m + lane % 16;
                load_matrices(left[m], x + tile_place(row, 2 * half + lane / 16));
            }
#pragma unroll
            for (int n = 0; n < PAIRS; ++n) {
                // Matrices: outputs 0-7 and inputs 0-7, 0-7 and 8-15, 8-15 and 0-7, 8-15 both.
                u32 output = warp_output + 16 * n + lane / 16 * 8 + lane % 8;
                load_matrices(right[n], w + tile_place(output, 2 * half + lane / 8 % 2));
            }
#pragma unroll
            for (int m = 0; m < 4; ++m) {
#pragma unroll
                for (int n = 0; n < 2 * PAIRS; ++n) {
                    mma_bf16(sums[m][n], left[m], right[n / 2][n % 2 * 2],
                             right[n / 2][n % 2 * 2 + 1]);
                }
            }
        }
    }
    u32 first_row = blockIdx.y * PRODUCT_ROWS + warp_row;
    u32 first_output = blockIdx.x * OUTPUTS + warp_output;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 2 * PAIRS; ++n) {
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

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)
product_bf16_128(const __grid_constant__ LinearArgs a) { product<128>(a); }

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)
product_bf16_256(const __grid_constant__ LinearArgs a) { product<256>(a); }
