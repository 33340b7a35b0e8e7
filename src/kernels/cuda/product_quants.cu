// The tiled product of many rows with a quantised matrix: tiles as in `product.cu`, and values of
// few bits on their way to shared memory, 64 bytes of an output at a time: four groups of 32 inputs
// in 4 bits, or two in 8. They become bf16 in registers, and scales come after a group's product,
// as in `linear.cu`: a sum is as exact here as there. Two blocks share a processor, for which there
// are registers with 64 rows a block; matrices that are small can be read more often.
#include "common.cuh"
#include "packing.cuh"

/// Steps whose rows are on their way, or there; of what 64 bytes of an output hold there are two.
constexpr int ROW_STAGES = 3;

/// What a thread copies of the scales of a tile's `LINES` outputs, `BYTES` for each chunk: at most
/// one piece.
template <int LINES, int BYTES>
struct ScaleCopy {
    static constexpr int PIECE = BYTES < 16 ? BYTES : 16, PIECES = BYTES / PIECE;
    static_assert(LINES * PIECES <= PRODUCT_THREADS, "at most one piece");
    const unsigned char *from;
    bool there;

    /// As `TileCopy`.
    template <class F>
    __device__ __forceinline__ ScaleCopy(const void *first, u64 stride, u32 end, F row_of) {
        u32 row = row_of(threadIdx.x / PIECES);
        there = row < end;
        from = (const unsigned char *)first + (there ? row * stride : 0) +
               threadIdx.x % PIECES * PIECE;
    }

    /// Starts to copy the next of each output.
    __device__ __forceinline__ void next(unsigned char *to) {
        if (threadIdx.x < LINES * PIECES) copy_async<PIECE>(to + threadIdx.x * PIECE, from, there);
        from += BYTES;
    }
};

/// Where in a tile lane `t` finds its inputs of a row, as `lane_inputs` has it: all, or those of
/// both halves.
template <bool HALVES>
__device__ __forceinline__ uint2 tile_inputs(u32 row, u32 t) {
    if (!HALVES) return {tile_place(row, t), 0};
    return {tile_place(row, t / 2) + t % 2 * 8, tile_place(row, t / 2 + 2) + t % 2 * 8};
}

/// Warps take 32 rows and `8 N` outputs each.
template <class P, int N>
__device__ __forceinline__ void product_quants(const LinearArgs &a) {
    constexpr int ROWS = 64, OUTPUTS = 32 * N, ROW_BYTES = ROWS * 64;
    /// Of a warp.
    constexpr int TILES = N / 2, ROW_TILES = 4;
    /// Steps for which 64 bytes of an output suffice, and bytes of its scales for them.
    constexpr int STEPS = P::CHUNK, SCALE_BYTES = 4 * P::template SCALES<STEPS>;
    constexpr int CHUNK_BYTES = OUTPUTS * (64 + SCALE_BYTES);
    static_assert(ROW_STAGES * ROW_BYTES + 2 * CHUNK_BYTES <= PRODUCT_BYTES, "it must fit");
    // Then what a step needs is two steps old, as its rows are.
    static_assert(STEPS >= ROW_STAGES - 1, "copies of a step are waited for together");
    SHARED_MEMORY(shared);
    unsigned char *chunks = shared + ROW_STAGES * ROW_BYTES;
    Ring<ROW_STAGES, ROW_BYTES> read_stages;
    Ring<2, CHUNK_BYTES> chunk_stages, read_chunks;
    Outputs<N> outputs(a);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 warp_row = warp / 4 * 8 * ROW_TILES, warp_line = warp % 4 * 8 * N;
    u32 all_steps = (a.weight.inputs + PRODUCT_STEP - 1) / PRODUCT_STEP;
    u32 all_chunks = (all_steps + STEPS - 1) / STEPS;
    u32 first_chunk = all_chunks * blockIdx.z / gridDim.z;
    u32 end = all_chunks * (blockIdx.z + 1) / gridDim.z * STEPS;
    u32 first_step = first_chunk * STEPS;
    u32 steps = (end < all_steps ? end : all_steps) - first_step;
    u64 row_chunks = a.weight.supers * (4 / STEPS);
    TileCopy<OUTPUTS> value_copy((const u8 *)a.weight.values + first_chunk * 64, row_chunks * 64,
                                 a.weight.outputs, outputs);
    ScaleCopy<OUTPUTS, SCALE_BYTES> scale_copy(
        (const u8 *)a.weight.scales + first_chunk * SCALE_BYTES, row_chunks * SCALE_BYTES,
        a.weight.outputs, outputs);
    auto load_chunk = [&] {
        unsigned char *to = chunks + chunk_stages.next();
        value_copy.next(to);
        scale_copy.next(to + OUTPUTS * 64);
    };
    // Weights are nobody's results: the first are on their way before this kernel's turn comes.
    load_chunk();
    u32 rows = begin_rows<ROWS>(a);
    if (rows == 0) return;
    RowCopy<ROWS, ROW_STAGES, ROW_BYTES> row_copy(a, rows, first_step);
    row_copy.start(shared, steps);
    float sums[TILES][ROW_TILES][4] = {};
    // Where a lane's first row lies in a stage, and its first output's values and scales in a
    // chunk; the others lie whole rows from there.
    uint2 row_place = tile_inputs<P::HALVES>(warp_row + g, t);
    u32 value_place = tile_place(warp_line + g, t);
    u32 scale_place = OUTPUTS * 64 + (warp_line + g) * SCALE_BYTES;
    for (u32 first = 0; first < steps; first += STEPS) {
        const unsigned char *chunk = chunks + read_chunks.next();
        u32 words[N][4];
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            u32 s = first + j;
            if (s >= steps) break;
            copy_wait<ROW_STAGES - 2>();
            __syncthreads();
            if (j == 0 && first + STEPS < steps) load_chunk();
            if (s + ROW_STAGES - 1 < steps) row_copy.next(shared);
            copy_commit();
            if (j == 0) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    load_words(words[n], (const u32 *)(chunk + value_place + n * 8 * 64));
                }
            }
            const unsigned char *stage = shared + read_stages.next();
            uint4 x[ROW_TILES];
            float totals[ROW_TILES][P::PARTS][2];
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
                const unsigned char *row = stage + r * 8 * 64;
                x[r] = load_inputs<P::HALVES>(row + row_place.x, row + row_place.y);
                add_inputs<P>(totals[r], x[r]);
            }
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                Lines of = lines(P::widened(words[2 * tile] + j * P::WORDS),
                                 P::widened(words[2 * tile + 1] + j * P::WORDS));
                float scale[2][P::PARTS][2];
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    u32 place = scale_place + (16 * tile + 8 * n) * SCALE_BYTES;
                    P::scales_of((const u32 *)(chunk + place), j, scale[n]);
                }
#pragma unroll
                for (int r = 0; r < ROW_TILES; ++r) {
                    float group[P::PARTS][4];
                    multiply<P>(group, of, x[r]);
                    add_scaled<P>(sums[tile][r], group, totals[r], scale);
                }
            }
        }
    }
    if (gridDim.z > 1 && !add_up<TILES, ROW_TILES>(a, sums, shared)) return;
    u32 first_output = outputs.first + warp % 4 * outputs.width + g;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; ++i) {
            u32 row = blockIdx.y * ROWS + warp_row + i / 2 * 8 + 2 * t + i % 2;
            u32 output = first_output + 8 * n;
            auto sum = [&](int of) { return sums[of / 2][i / 2][of % 2 * 2 + i % 2]; };
            if (a.gated) {
                if (n >= N / 2 || row >= rows || output >= a.gated) continue;
                write(a.output, row, output, silu_times(sum(n), sum(n % (N / 2) + N / 2)));
            } else if (row < rows && output < a.weight.outputs) {
                finish(a, row, output, sum(n));
            }
        }
    }
}

#define PRODUCT(name, P, N)                                            \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, 2)   \
    name(const __grid_constant__ LinearArgs a) { product_quants<P, N>(a); }

PRODUCT(product_q4_64x64, Q4, 2)
PRODUCT(product_q4_64x128, Q4, 4)
PRODUCT(product_q4h_64x64, Q4Halves, 2)
PRODUCT(product_q4h_64x128, Q4Halves, 4)
PRODUCT(product_q8_64x64, Q8, 2)
PRODUCT(product_q8_64x128, Q8, 4)
PRODUCT(product_q8m_64x64, Q8Minimum, 2)
PRODUCT(product_q8m_64x128, Q8Minimum, 4)
PRODUCT(product_q8h_64x64, Q8Halves, 2)
PRODUCT(product_q8h_64x128, Q8Halves, 4)

#undef PRODUCT
