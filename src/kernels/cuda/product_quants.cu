// The tiled product of many rows with a quantised matrix: tiles as in `product.cu`, and values of
// few bits on their way to shared memory, 64 bytes of an output at a time: four groups of 32 inputs
// in 4 bits, or two in 8. They become bf16 in registers, and scales come after a group's product,
// as in `linear.cu`: a sum is as exact here as there. Two blocks share a processor, for which there
// are registers with 64 rows a block; matrices that are small can be read more often.
#include "common.cuh"
#include "packing.cuh"

/// Steps whose rows are on their way, or there; of what 64 bytes of an output hold there are two.
constexpr int ROW_STAGES = 3;

/// Starts to copy `PIECES` times `BYTES` bytes of each of `LINES` outputs from `offset` on;
/// `output_of` says which, and those from `end` on are zero.
template <int LINES, int PIECES, int BYTES, class F>
__device__ __forceinline__ void load_pieces(unsigned char *tile, const unsigned char *from,
                                            u64 stride, u64 offset, u32 end, F output_of) {
    for (u32 i = threadIdx.x; i < LINES * PIECES; i += PRODUCT_THREADS) {
        u32 line = i / PIECES, piece = i % PIECES, output = output_of(line);
        bool there = output < end;
        const unsigned char *at = from + (there ? output * stride + offset + piece * BYTES : 0);
        copy_async<BYTES>(tile + i * BYTES, at, there);
    }
}

/// What lane `t` takes of a row of a tile, as `lane_inputs` has it.
template <bool HALVES>
__device__ __forceinline__ uint4 tile_inputs(const unsigned char *tile, u32 row, u32 t) {
    if (!HALVES) return *(const uint4 *)(tile + tile_place(row, t));
    uint2 first = *(const uint2 *)(tile + tile_place(row, t / 2) + t % 2 * 8);
    uint2 last = *(const uint2 *)(tile + tile_place(row, t / 2 + 2) + t % 2 * 8);
    return {first.x, first.y, last.x, last.y};
}

/// Warps take 32 rows and `8 N` outputs each.
template <class P, int N>
__device__ __forceinline__ void product_quants(const LinearArgs &a) {
    constexpr int M = 2, ROWS = 32 * M, OUTPUTS = 32 * N, ROW_BYTES = ROWS * 64;
    /// Steps for which 64 bytes of an output suffice, and bytes of its scales for them.
    constexpr int STEPS = P::CHUNK, WORDS = P::template SCALES<STEPS>, SCALE_BYTES = 4 * WORDS;
    constexpr int SCALE_PIECE = SCALE_BYTES < 16 ? SCALE_BYTES : 16;
    constexpr int CHUNK_BYTES = OUTPUTS * (64 + SCALE_BYTES);
    static_assert(ROW_STAGES * ROW_BYTES + 2 * CHUNK_BYTES <= PRODUCT_BYTES, "it must fit");
    // Then what a step needs is two steps old, as its rows are.
    static_assert(STEPS >= ROW_STAGES - 1, "copies of a step are waited for together");
    SHARED_MEMORY(shared);
    unsigned char *chunks = shared + ROW_STAGES * ROW_BYTES;
    Outputs<N> outputs(a);
    u32 block_row = blockIdx.y * ROWS;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 warp_row = warp / 4 * 16 * M, warp_line = warp % 4 * 8 * N;
    u32 all_steps = (a.weight.inputs + PRODUCT_STEP - 1) / PRODUCT_STEP;
    u32 all_chunks = (all_steps + STEPS - 1) / STEPS;
    u32 first_chunk = all_chunks * blockIdx.z / gridDim.z;
    u32 end = all_chunks * (blockIdx.z + 1) / gridDim.z * STEPS;
    u32 first_step = first_chunk * STEPS, steps = (end < all_steps ? end : all_steps) - first_step;
    auto load_chunk = [&](u32 chunk) {
        unsigned char *to = chunks + chunk % 2 * CHUNK_BYTES;
        u64 of = first_chunk + chunk, stride = a.weight.supers * (4 / STEPS);
        load_pieces<OUTPUTS, 4, 16>(to, (const unsigned char *)a.weight.values, stride * 64,
                                    of * 64, a.weight.outputs, outputs);
        load_pieces<OUTPUTS, SCALE_BYTES / SCALE_PIECE, SCALE_PIECE>(
            to + OUTPUTS * 64, (const unsigned char *)a.weight.scales, stride * SCALE_BYTES,
            of * SCALE_BYTES, a.weight.outputs, outputs);
    };
    // Weights are nobody's results: the first are on their way before this kernel's turn comes.
    load_chunk(0);
    begin();
    u32 rows = row_count(a.step, a.gathered);
    if (block_row >= rows) {
        copy_commit();
        copy_wait<0>();
        return;
    }
    auto load_rows = [&](u32 step) {
        load_tile<ROWS>(shared + step % ROW_STAGES * ROW_BYTES,
                        a.input + (first_step + step) * PRODUCT_STEP, a.stride, rows,
                        [&](u32 line) { return block_row + line; });
    };
    float sums[M][N][4] = {};
    for (u32 s = 0; s < ROW_STAGES - 1; ++s) {
        if (s < steps) load_rows(s);
        copy_commit();
    }
    for (u32 chunk = 0; chunk * STEPS < steps; ++chunk) {
        const unsigned char *values = chunks + chunk % 2 * CHUNK_BYTES;
        const u32 *scales = (const u32 *)(values + OUTPUTS * 64);
        u32 words[N][4];
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            u32 s = chunk * STEPS + j, ahead = s + ROW_STAGES - 1;
            if (s >= steps) break;
            copy_wait<ROW_STAGES - 2>();
            __syncthreads();
            if (j == 0 && (chunk + 1) * STEPS < steps) load_chunk(chunk + 1);
            if (ahead < steps) load_rows(ahead);
            copy_commit();
            if (j == 0) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    load_words(words[n], (const u32 *)(values + (warp_line + 8 * n + g) * 64) +
                                             4 * t);
                }
            }
            const unsigned char *x = shared + s % ROW_STAGES * ROW_BYTES;
            u32 first[M][4], second[M][4];
            float totals[M][P::PARTS][2];
#pragma unroll
            for (int m = 0; m < M; ++m) {
                u32 row = warp_row + 16 * m + g;
                Rows two = {tile_inputs<P::HALVES>(x, row, t),
                            tile_inputs<P::HALVES>(x, row + 8, t)};
                first_part(first[m], two);
                second_part(second[m], two);
                total<P>(first[m], second[m], totals[m]);
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                uint4 w = P::widened(words[n] + j * P::WORDS);
                float scale[P::PARTS][2][2];
#pragma unroll
                for (int part = 0; part < P::PARTS; ++part) {
                    for (int i = 0; i < 2; ++i) {
                        const u32 *of = scales + (warp_line + 8 * n + 2 * t + i) * WORDS;
                        P::scale_of(of, j * P::PARTS + part, scale[part][i]);
                    }
                }
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    add_group<P>(first[m], second[m], totals[m], w, scale, sums[m][n]);
                }
            }
        }
    }
    if (gridDim.z > 1 && !add_up<M, N>(a, sums, shared)) return;
    finish_tile<M, N>(a, sums, rows, block_row + warp_row, outputs);
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
