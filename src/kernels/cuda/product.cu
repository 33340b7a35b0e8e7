// The tiled product of many rows with a bf16 matrix: 128 rows × 128 outputs a block, or less where
// that would leave processors without one, 32 inputs at a time; eight warps, two by four. Two of
// the largest blocks share a processor: one with 256 outputs fills it alone, and was slower (H200,
// 2026-11). Where tiles are still too few, several blocks share one, each with a part of the
// inputs.
#include "common.cuh"

constexpr int PRODUCT_STEP = 32;
constexpr int PRODUCT_THREADS = 256;
/// Steps that are on their way to shared memory, or there, fill so much of it.
constexpr int PRODUCT_BYTES = 48 << 10;

/// Where 16-byte piece `piece` of row `row` lies in a tile. What is loaded together must lie in
/// different banks: one piece of eight rows, all pieces of two, and a half of two neighbouring
/// pieces of four.
__device__ __forceinline__ u32 tile_place(u32 row, u32 piece) {
    return row * 64 + (piece ^ (row & 2) ^ (row >> 2 & 1)) * 16;
}

/// What a thread copies of a tile: 16 of the 64 bytes of each 64th of its `LINES` lines. Where from
/// is found out once: what a step takes must be little beside its products.
template <int LINES>
struct TileCopy {
    static constexpr int COUNT = LINES / 64;
    const unsigned char *from[COUNT];
    bool there[COUNT];
    u32 to;

    /// Lines begin at `first`, and `stride` bytes from each other; `row_of` says which row a line
    /// is, and those from `end` on are zero.
    template <class F>
    __device__ __forceinline__ TileCopy(const void *first, u64 stride, u32 end, F row_of) {
        u32 line = threadIdx.x / 4, piece = threadIdx.x % 4;
        to = tile_place(line, piece);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            u32 row = row_of(line + 64 * i);
            there[i] = row < end;
            from[i] = (const unsigned char *)first + (there[i] ? row * stride : 0) + piece * 16;
        }
    }

    /// Starts to copy the next 64 bytes of each line.
    __device__ __forceinline__ void next(unsigned char *tile) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            copy_async(tile + to + i * 64 * 64, from[i], there[i]);
            from[i] += 64;
        }
    }
};

/// Where in shared memory the next of `COUNT` stages of `BYTES` lies.
template <int COUNT, int BYTES>
struct Ring {
    u32 at = 0;

    __device__ __forceinline__ u32 next() {
        u32 now = at;
        at = now == (COUNT - 1) * BYTES ? 0 : now + BYTES;
        return now;
    }
};

/// This kernel's turn, and how many rows there are; 0 if none is of this block of `ROWS`, and what
/// it has begun to copy has come.
template <int ROWS>
__device__ __forceinline__ u32 begin_rows(const LinearArgs &a) {
    begin();
    u32 rows = row_count(a.step, a.gathered);
    if (blockIdx.y * ROWS < rows) return rows;
    copy_commit();
    copy_wait<0>();
    return 0;
}

/// A block's rows on their way to the first `ROWS` lines of stages, a step at a time.
template <int ROWS, int STAGES, int STAGE_BYTES>
struct RowCopy {
    TileCopy<ROWS> tile;
    Ring<STAGES, STAGE_BYTES> stages;

    __device__ __forceinline__ RowCopy(const LinearArgs &a, u32 rows, u32 first_step)
        : tile(a.input + first_step * PRODUCT_STEP, a.stride * 2, rows,
               [](u32 line) { return blockIdx.y * ROWS + line; }) {}

    /// Starts to copy the next step's.
    __device__ __forceinline__ void next(unsigned char *shared) {
        tile.next(shared + stages.next());
    }

    /// Starts to copy those of the first of `steps`, and of what else has been begun.
    __device__ __forceinline__ void start(unsigned char *shared, u32 steps) {
        for (u32 s = 0; s < STAGES - 1; ++s) {
            if (s < steps) next(shared);
            copy_commit();
        }
    }
};

/// Sums of the blocks of one tile, in the last of them to end: in fixed order, so that bits do not
/// depend on who that is. False in the others.
template <int M, int N>
__device__ __forceinline__ bool add_up(const LinearArgs &a, float (&sums)[M][N][4],
                                       unsigned char *shared) {
    u32 tile = blockIdx.y * gridDim.x + blockIdx.x;
    uint4 *parts = (uint4 *)a.parts + (u64)tile * gridDim.z * M * N * PRODUCT_THREADS + threadIdx.x;
    auto place = [&](u32 part, int m, int n) -> uint4 * {
        return parts + ((part * M + m) * N + n) * PRODUCT_THREADS;
    };
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float(&of)[4] = sums[m][n];
            *place(blockIdx.z, m, n) = {__float_as_uint(of[0]), __float_as_uint(of[1]),
                                        __float_as_uint(of[2]), __float_as_uint(of[3])};
        }
    }
    __threadfence();
    __syncthreads();
    u32 *arrived = (u32 *)shared;
    if (threadIdx.x == 0) {
        // Of what the others have written before the barrier, too.
        __threadfence();
        *arrived = atomicAdd(a.arrived + tile, 1u) + 1;
    }
    __syncthreads();
    if (*arrived != gridDim.z) return false;
    // For the next product.
    if (threadIdx.x == 0) a.arrived[tile] = 0;
    __threadfence();
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float(&of)[4] = sums[m][n];
            of[0] = of[1] = of[2] = of[3] = 0.0f;
            for (u32 part = 0; part < gridDim.z; ++part) {
                // From where all blocks see it, which the nearest cache is not.
                uint4 added = __ldcg(place(part, m, n));
                of[0] += __uint_as_float(added.x), of[1] += __uint_as_float(added.y);
                of[2] += __uint_as_float(added.z), of[3] += __uint_as_float(added.w);
            }
        }
    }
    return true;
}

/// The outputs of a block whose warps take `8 N` each: if gated, half of them are gates, and the
/// other half what these let through.
template <int N>
struct Outputs {
    const LinearArgs &a;
    u32 width, first;

    __device__ __forceinline__ explicit Outputs(const LinearArgs &args)
        : a(args), width(a.gated ? 4 * N : 8 * N), first(blockIdx.x * 4 * width) {}

    /// Which row of the matrix is line `line` of a tile: one that is not there if it has none.
    __device__ __forceinline__ u32 operator()(u32 line) const {
        u32 of = line % (8 * N), up = of >= width;
        u32 output = first + line / (8 * N) * width + of - up * width;
        if (a.gated && output >= a.gated) return a.weight.outputs;
        return output + up * a.gated;
    }
};

/// Warps take `16 M` rows and `8 N` outputs each.
template <int M, int N>
__device__ __forceinline__ void product(const LinearArgs &a) {
    constexpr int ROWS = 32 * M, OUTPUTS = 32 * N;
    /// Bytes of one stage: rows, then outputs, of 32 values.
    constexpr int STAGE_BYTES = (ROWS + OUTPUTS) * PRODUCT_STEP * 2;
    constexpr int STAGES = PRODUCT_BYTES / STAGE_BYTES;
    SHARED_MEMORY(shared);
    Outputs<N> outputs(a);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 warp_row = warp / 4 * 16 * M, warp_line = warp % 4 * 8 * N;
    u32 all_steps = (a.weight.inputs + PRODUCT_STEP - 1) / PRODUCT_STEP;
    u32 first_step = all_steps * blockIdx.z / gridDim.z;
    u32 steps = all_steps * (blockIdx.z + 1) / gridDim.z - first_step;
    Ring<STAGES, STAGE_BYTES> weight_stages, read_stages;
    const u16 *weights = (const u16 *)a.weight.values + first_step * PRODUCT_STEP;
    TileCopy<OUTPUTS> weight_copy(weights, a.weight.supers * SUPER * 2, a.weight.outputs, outputs);
    auto load_weights = [&] { weight_copy.next(shared + ROWS * 64 + weight_stages.next()); };
    // Weights are nobody's results: the first are on their way before this kernel's turn comes.
    for (u32 s = 0; s < STAGES - 1 && s < steps; ++s) load_weights();
    u32 rows = begin_rows<ROWS>(a);
    if (rows == 0) return;
    RowCopy<ROWS, STAGES, STAGE_BYTES> row_copy(a, rows, first_step);
    row_copy.start(shared, steps);
    float sums[M][N][4] = {};
    // Of a lane's first matrix in a stage; the others lie whole rows, or two pieces, from there.
    // Those of weights: outputs 0-7 and inputs 0-7, 0-7 and 8-15, 8-15 and 0-7, 8-15 both.
    u32 left_place = tile_place(warp_row + lane % 16, lane / 16);
    u32 right_place =
        ROWS * 64 + tile_place(warp_line + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    for (u32 s = 0; s < steps; ++s) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (s + STAGES - 1 < steps) {
            load_weights();
            row_copy.next(shared);
        }
        copy_commit();
        const unsigned char *stage = shared + read_stages.next();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 left[M][4], right[N / 2][4];
            const unsigned char *x = stage + (left_place ^ half * 32);
            const unsigned char *w = stage + (right_place ^ half * 32);
#pragma unroll
            for (int m = 0; m < M; ++m) load_matrices(left[m], x + m * 16 * 64);
#pragma unroll
            for (int n = 0; n < N / 2; ++n) load_matrices(right[n], w + n * 16 * 64);
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    mma_bf16(sums[m][n], left[m], right[n / 2][n % 2 * 2],
                             right[n / 2][n % 2 * 2 + 1]);
                }
            }
        }
    }
    if (gridDim.z > 1 && !add_up<M, N>(a, sums, shared)) return;
    u32 first_row = blockIdx.y * ROWS + warp_row;
    u32 first_output = outputs.first + warp % 4 * outputs.width;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u32 row = first_row + 16 * m + lane / 4 + i * 8;
                u32 output = first_output + 8 * n + lane % 4 * 2;
                float x = sums[m][n][2 * i], y = sums[m][n][2 * i + 1];
                if (a.gated) {
                    if (n >= N / 2 || row >= rows || output >= a.gated) continue;
                    const float(&up)[4] = sums[m][n % (N / 2) + N / 2];
                    write_pair(a.output, row, output, silu_times(x, up[2 * i]),
                               silu_times(y, up[2 * i + 1]));
                } else if (row < rows && output < a.weight.outputs) {
                    finish_pair(a, row, output, x, y);
                }
            }
        }
    }
}

#define PRODUCT(name, M, N)                                         \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS)   \
    name(const __grid_constant__ LinearArgs a) { product<M, N>(a); }

PRODUCT(product_bf16_64x64, 2, 2)
PRODUCT(product_bf16_64x128, 2, 4)
PRODUCT(product_bf16_128x128, 4, 4)

#undef PRODUCT
