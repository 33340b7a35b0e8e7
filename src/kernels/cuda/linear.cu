// Matrix products. `linear_*` takes up to 64 rows a block and reads weights straight into
// registers, once: it is for steps whose time is that of reading weights. `product_*` is the usual
// tiled product for many rows.
//
// Rows of an input are padded with zeros to a multiple of 32 values, matrices to multiples of 128
// inputs and 16 outputs, so that loads need no bounds but that of rows.
#include "common.cuh"
#include "packing.cuh"

constexpr int LINEAR_WARPS = 8;

/// What happens to a sum.
constexpr u32 STORE = 0, ADD = 1, GELU = 2, TANH = 3, RELU = 4;

struct LinearArgs {
    const Step *step;
    const u16 *input;  // bf16
    const float *bias;  // or null
    Matrix weight;
    View output;
    u32 stride;  // of the input
    u32 gathered;
    u32 epilogue;
    u32 gated;  // 0, or how many outputs there are of silu(gate) × up: gates first, then ups
    // What the input is the norm of, for kernels that normalise:
    const float *full;
    const float *scales;
    u32 full_stride;
    float eps;
    // Where several blocks share a tile:
    float *parts;  // their sums
    u32 *arrived;  // how many of them are done, by tile; 0 between products
};

__device__ __forceinline__ float finished(const LinearArgs &a, u32 row, u32 output, float y) {
    if (a.bias) y += a.bias[output];
    if (a.epilogue == ADD) y += read(a.output, row, output);
    if (a.epilogue == GELU) y = 0.5f * y * (1.0f + erff(y * 0.70710678f));
    if (a.epilogue == TANH) y = tanhf(y);
    if (a.epilogue == RELU) y = y > 0.0f ? y : 0.0f;
    return y;
}

__device__ __forceinline__ void finish(const LinearArgs &a, u32 row, u32 output, float y) {
    write(a.output, row, output, finished(a, row, output, y));
}

/// Writes two values, the first to an even column.
__device__ __forceinline__ void write_pair(const View &view, u32 row, u32 column, float x,
                                           float y) {
    if (view.half && view.stride % 2 == 0) {
        ((u32 *)view.data)[((u64)row * view.stride + column) / 2] = pack_bf16(x, y);
        return;
    }
    write(view, row, column, x);
    write(view, row, column + 1, y);
}

/// Two outputs of a row, the first with an even number.
__device__ __forceinline__ void finish_pair(const LinearArgs &a, u32 row, u32 output, float x,
                                            float y) {
    x = finished(a, row, output, x);
    if (output + 1 < a.weight.outputs) {
        write_pair(a.output, row, output, x, finished(a, row, output + 1, y));
    } else {
        write(a.output, row, output, x);
    }
}

/// Where a lane finds its inputs of a row: 128 of them, and the 128 after those of all warps. A row
/// that is not there is the last one again: nobody writes what becomes of it.
template <bool HALVES>
struct PlainRows {
    static constexpr bool NORMED = false;
    const u16 *from;

    __device__ __forceinline__ void start(const LinearArgs &a, u32 row, u32 rows, u32 input,
                                          u32 t) {
        from = a.input + (u64)min(row, rows - 1) * a.stride + input + lane_inputs<HALVES>(t);
    }

    /// Those of group `j`.
    __device__ __forceinline__ uint4 load(int j, float &) const {
        const u16 *first = from + 32 * j;
        return load_inputs<HALVES>(first, first + LAST_INPUTS<HALVES>);
    }

    __device__ __forceinline__ void next() { from += LINEAR_WARPS * SUPER; }
};

/// The same of rows that are yet to be normalised: they come scaled by the norm's weights, and
/// their squares are added up, by which the whole sum is divided in the end.
template <bool HALVES>
struct RowsToNorm {
    static constexpr bool NORMED = true;
    const float *from, *scales;

    __device__ __forceinline__ void start(const LinearArgs &a, u32 row, u32 rows, u32 input,
                                          u32 t) {
        input += lane_inputs<HALVES>(t);
        from = a.full + (u64)min(row, rows - 1) * a.full_stride + input;
        scales = a.scales + input;
    }

    __device__ __forceinline__ uint4 load(int j, float &squares) const {
        u32 pairs[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 at = 32 * j + half * LAST_INPUTS<HALVES>, words[4], scale[4];
            load_words(words, (const u32 *)(from + at));
            load_words(scale, (const u32 *)(scales + at));
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                float x = __uint_as_float(words[i]), y = __uint_as_float(words[i + 1]);
                squares += x * x;
                squares += y * y;
                pairs[half * 2 + i / 2] = pack_bf16(x * __uint_as_float(scale[i]),
                                                    y * __uint_as_float(scale[i + 1]));
            }
        }
        return {pairs[0], pairs[1], pairs[2], pairs[3]};
    }

    __device__ __forceinline__ void next() {
        from += LINEAR_WARPS * SUPER;
        scales += LINEAR_WARPS * SUPER;
    }
};

/// 128 inputs of 8 outputs in bf16.
struct Bf16 {
    static constexpr bool GROUPED = false, HALVES = false;
    static constexpr int PARTS = 1;
    uint4 words[4];

    /// Where a lane finds them, and those after all warps'.
    struct Source {
        const u16 *values;

        __device__ __forceinline__ void start(const Matrix &m, u32 output, u32 super, u32 g,
                                              u32 t) {
            u64 piece = (u64)(output + g) * m.supers + super;
            values = (const u16 *)m.values + piece * SUPER + lane_inputs<HALVES>(t);
        }
    };

    __device__ __forceinline__ void load(Source &from) {
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = *(const uint4 *)(from.values + 32 * j);
        from.values += LINEAR_WARPS * SUPER;
    }

    __device__ __forceinline__ uint4 values(int j) const { return words[j]; }
};

/// 128 inputs of 8 outputs in few bits.
template <class P>
struct Quants : P {
    static constexpr bool GROUPED = true;
    static constexpr int LOADS = 4 / P::CHUNK, SCALES = P::template SCALES<4>;
    u32 words[LOADS][4];
    u32 scales[SCALES];

    struct Source {
        const u32 *values, *scales;

        __device__ __forceinline__ void start(const Matrix &m, u32 output, u32 super, u32 g,
                                              u32 t) {
            u64 piece = (u64)(output + g) * m.supers + super;
            values = (const u32 *)m.values + piece * 16 * LOADS + 4 * t;
            scales = (const u32 *)m.scales + piece * SCALES;
        }
    };

    __device__ __forceinline__ void load(Source &from) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) load_words(words[i], from.values + 16 * i);
        from.values += LINEAR_WARPS * 16 * LOADS;
        load_words(scales, from.scales);
        from.scales += LINEAR_WARPS * SCALES;
    }

    __device__ __forceinline__ uint4 values(int j) const {
        return P::widened(words[j / P::CHUNK] + j % P::CHUNK * P::WORDS);
    }
};

/// Adds the products of a group with eight rows. With `COUNT` = 1, the lines for outputs `g + 8`
/// are ones: what they give are sums of the inputs.
template <class W, int COUNT>
__device__ __forceinline__ void add_group(float (&sums)[4], const Lines &of, const uint4 &x,
                                          const float (&scales)[COUNT][W::PARTS][2]) {
    float group[W::PARTS][4], totals[W::PARTS][2];
    multiply<W>(group, of, x);
    if (COUNT == 2) add_inputs<W>(totals, x);
#pragma unroll
    for (int i = 0; i < 2 * W::PARTS; ++i) {
        if (COUNT == 1) totals[i / 2][i % 2] = group[i / 2][2 + i % 2];
    }
    add_scaled<W>(sums, group, totals, scales);
}

/// Up to `8 ROW_TILES` rows and `8 N` outputs a block, or 8 gated ones with N = 2; its warps share
/// the inputs, and add up in the same order whatever ROW_TILES and N are, so that a row's sum does
/// not depend on its company. What is multiplied are rows, or their norms, which are made on the
/// way.
template <class W, int ROW_TILES, int N, template <bool> class Input>
__device__ __forceinline__ void linear(const LinearArgs &a) {
    constexpr bool NORMED = Input<W::HALVES>::NORMED;
    constexpr int ROWS = 8 * ROW_TILES, OUTPUTS = 8 * N;
    SHARED_MEMORY(shared);
    bool gated = N == 2 && a.gated != 0;
    u32 first_row = blockIdx.y * ROWS, first_output = blockIdx.x * (gated ? 8 : OUTPUTS);
    u32 apart = gated ? a.gated : 8;
    u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float sums[ROW_TILES][4] = {};
    float squares[ROW_TILES] = {};
    // Weights are nobody's results: the first are on their way before this kernel's turn comes.
    // Where there are registers, so are the next while some are multiplied.
    constexpr bool AHEAD = ROW_TILES * N <= 8;
    // As many groups of inputs are asked for before the first is waited for. More would take the
    // registers that a second block of the processor needs.
    constexpr int TOGETHER = ROW_TILES > 2 ? 1 : 4 / (NORMED ? 2 : 1) / W::PARTS;
    W weights[N], next[N];
    typename W::Source source[N];
#pragma unroll
    for (int n = 0; n < N; ++n) source[n].start(a.weight, first_output + apart * n, warp, g, t);
    auto load = [&](W (&to)[N], u32 super) {
        if (super >= a.weight.supers) return;
#pragma unroll
        for (int n = 0; n < N; ++n) to[n].load(source[n]);
    };
    load(weights, warp);
    begin();
    u32 rows = row_count(a.step, a.gathered);
    if (first_row >= rows) return;
    int there = rows - first_row;
    Input<W::HALVES> input[ROW_TILES];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
        input[r].start(a, first_row + 8 * r + g, rows, warp * SUPER, t);
    }
    for (u32 super = warp; super < a.weight.supers; super += LINEAR_WARPS) {
        if (AHEAD) load(next, super + LINEAR_WARPS);
#pragma unroll
        for (int group = 0; group < 4; group += TOGETHER) {
            uint4 x[TOGETHER][ROW_TILES];
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j) {
                u32 column = super * SUPER + 32 * (group + j);
#pragma unroll
                for (int r = 0; r < ROW_TILES; ++r) {
                    x[j][r] = {0, 0, 0, 0};
                    if (column >= a.weight.inputs || (r > 0 && 8 * r >= there)) continue;
                    x[j][r] = input[r].load(group + j, squares[r]);
                }
            }
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j) {
                // The lines that 8 outputs leave add up the inputs, if they are asked for.
                Lines of = lines(weights[0].values(group + j),
                                 N == 2 ? weights[N - 1].values(group + j) : ones());
                float scales[N][W::PARTS][2];
                if constexpr (W::GROUPED) {
#pragma unroll
                    for (int n = 0; n < N; ++n) {
                        W::scales_of(weights[n].scales, group + j, scales[n]);
                    }
                }
#pragma unroll
                for (int r = 0; r < ROW_TILES; ++r) {
                    if (r > 0 && 8 * r >= there) break;
                    if constexpr (W::GROUPED) {
                        add_group<W>(sums[r], of, x[j][r], scales);
                    } else {
                        mma_bf16(sums[r], of.first, x[j][r].x, x[j][r].y);
                        mma_bf16(sums[r], of.second, x[j][r].z, x[j][r].w);
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) input[r].next();
        if (AHEAD) {
#pragma unroll
            for (int n = 0; n < N; ++n) weights[n] = next[n];
        } else {
            load(weights, super + LINEAR_WARPS);
        }
    }
    constexpr int CELLS = ROWS * OUTPUTS;
    float *parts = (float *)shared, *norms = parts + LINEAR_WARPS * CELLS;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
        if (NORMED) {
            float sum = squares[r];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            if (t == 0) norms[warp * ROWS + 8 * r + g] = sum;
        }
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) {
            u32 row = 8 * r + 2 * t + i % 2, output = i / 2 * 8 + g;
            parts[warp * CELLS + row * OUTPUTS + output] = sums[r][i];
        }
    }
    __syncthreads();
    auto sum_of = [&](u32 cell) {
        float sum = 0.0f;
        for (int w = 0; w < LINEAR_WARPS; ++w) sum += parts[w * CELLS + cell];
        if (!NORMED) return sum;
        float square = 0.0f;
        for (int w = 0; w < LINEAR_WARPS; ++w) square += norms[w * ROWS + cell / OUTPUTS];
        return sum * rsqrtf(square / (float)a.weight.inputs + a.eps);
    };
    if (gated) {
        for (u32 i = threadIdx.x; i < ROWS * 8; i += 32 * LINEAR_WARPS) {
            u32 row = first_row + i / 8, cell = i / 8 * OUTPUTS + i % 8;
            float y = silu_times(sum_of(cell), sum_of(cell + 8));
            if (row < rows) write(a.output, row, first_output + i % 8, y);
        }
        return;
    }
    for (u32 cell = threadIdx.x; cell < CELLS; cell += 32 * LINEAR_WARPS) {
        u32 row = first_row + cell / OUTPUTS, output = first_output + cell % OUTPUTS;
        float sum = sum_of(cell);
        if (row < rows && output < a.weight.outputs) finish(a, row, output, sum);
    }
}

// Of 16 x 16, two blocks share a processor, or its memory would wait; the others do by themselves.
#define LINEAR(name, W, ROW_TILES, N, INPUT)                                                  \
    extern "C" __global__ void                                                                \
    __launch_bounds__(32 * LINEAR_WARPS, ROW_TILES == 2 && N == 2 ? 2 : 0)                 \
    name(const __grid_constant__ LinearArgs a) { linear<W, ROW_TILES, N, INPUT>(a); }

LINEAR(linear_bf16_16x8, Bf16, 2, 1, PlainRows)
LINEAR(linear_bf16_16x8_norm, Bf16, 2, 1, RowsToNorm)
LINEAR(linear_bf16_16x16, Bf16, 2, 2, PlainRows)
LINEAR(linear_bf16_16x16_norm, Bf16, 2, 2, RowsToNorm)
LINEAR(linear_bf16_32x16, Bf16, 4, 2, PlainRows)
LINEAR(linear_bf16_64x16, Bf16, 8, 2, PlainRows)
LINEAR(linear_q4_16x8, Quants<Q4>, 2, 1, PlainRows)
LINEAR(linear_q4_16x8_norm, Quants<Q4>, 2, 1, RowsToNorm)
LINEAR(linear_q4_16x16, Quants<Q4>, 2, 2, PlainRows)
LINEAR(linear_q4_16x16_norm, Quants<Q4>, 2, 2, RowsToNorm)
LINEAR(linear_q4_32x16, Quants<Q4>, 4, 2, PlainRows)
LINEAR(linear_q4_64x16, Quants<Q4>, 8, 2, PlainRows)
LINEAR(linear_q4h_16x8, Quants<Q4Halves>, 2, 1, PlainRows)
LINEAR(linear_q4h_16x8_norm, Quants<Q4Halves>, 2, 1, RowsToNorm)
LINEAR(linear_q4h_16x16, Quants<Q4Halves>, 2, 2, PlainRows)
LINEAR(linear_q4h_16x16_norm, Quants<Q4Halves>, 2, 2, RowsToNorm)
LINEAR(linear_q4h_32x16, Quants<Q4Halves>, 4, 2, PlainRows)
LINEAR(linear_q4h_64x16, Quants<Q4Halves>, 8, 2, PlainRows)
LINEAR(linear_q8_16x8, Quants<Q8>, 2, 1, PlainRows)
LINEAR(linear_q8_16x8_norm, Quants<Q8>, 2, 1, RowsToNorm)
LINEAR(linear_q8_16x16, Quants<Q8>, 2, 2, PlainRows)
LINEAR(linear_q8_16x16_norm, Quants<Q8>, 2, 2, RowsToNorm)
LINEAR(linear_q8_32x16, Quants<Q8>, 4, 2, PlainRows)
LINEAR(linear_q8_64x16, Quants<Q8>, 8, 2, PlainRows)
LINEAR(linear_q8m_16x8, Quants<Q8Minimum>, 2, 1, PlainRows)
LINEAR(linear_q8m_16x8_norm, Quants<Q8Minimum>, 2, 1, RowsToNorm)
LINEAR(linear_q8m_16x16, Quants<Q8Minimum>, 2, 2, PlainRows)
LINEAR(linear_q8m_16x16_norm, Quants<Q8Minimum>, 2, 2, RowsToNorm)
LINEAR(linear_q8m_32x16, Quants<Q8Minimum>, 4, 2, PlainRows)
LINEAR(linear_q8m_64x16, Quants<Q8Minimum>, 8, 2, PlainRows)
LINEAR(linear_q8h_16x8, Quants<Q8Halves>, 2, 1, PlainRows)
LINEAR(linear_q8h_16x8_norm, Quants<Q8Halves>, 2, 1, RowsToNorm)
LINEAR(linear_q8h_16x16, Quants<Q8Halves>, 2, 2, PlainRows)
LINEAR(linear_q8h_16x16_norm, Quants<Q8Halves>, 2, 2, RowsToNorm)
LINEAR(linear_q8h_32x16, Quants<Q8Halves>, 4, 2, PlainRows)
LINEAR(linear_q8h_64x16, Quants<Q8Halves>, 8, 2, PlainRows)

#undef LINEAR
