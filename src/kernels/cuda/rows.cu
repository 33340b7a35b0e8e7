// Ops on single rows: embedding, norms, gated SiLU, gather, pooling; the table of pages, and
// copies of blocks.
#include "common.cuh"

constexpr int ROW_THREADS = 256;

struct EmbedArgs {
    const Step *step;
    Matrix table;
    const float *positions;  // or null
    const float *types;      // or null
    const u32 *seats;
    View output;
};

/// Value `column` of row `row` of a matrix.
__device__ __forceinline__ float matrix_value(const Matrix &m, u32 row, u32 column) {
    u64 super = (u64)row * m.supers + column / SUPER;
    if (m.format == MATRIX_BF16) {
        return from_bf16(((const u16 *)m.values)[super * SUPER + column % SUPER]);
    }
    u32 group = column % SUPER / 32, lane = column % 32 / 8, i = column % 8;
    u64 part = super * 4 + group;
    if (m.format & MATRIX_HALVES) {
        u32 half = column % 32 / 16;
        lane = column % 16 / 4, i = column % 4 + 4 * half;
        part = part * 2 + half;
    }
    const u16 *scales = (const u16 *)m.scales;
    float scale = from_f16(scales[m.format & MATRIX_MINIMUM ? part * 2 : part]);
    float minimum = m.format & MATRIX_MINIMUM ? from_f16(scales[part * 2 + 1]) : 0.0f;
    if (m.format & MATRIX_4_BITS) {
        u32 word = ((const u32 *)m.values)[super * 16 + lane * 4 + group];
        return __fmaf_rn((float)(word >> (i / 2 * 4 + i % 2 * 16) & 15), scale, minimum);
    }
    u64 at = super * SUPER + group / 2 * 64 + lane * 16 + group % 2 * 8;
    at += (i & 4) | (i & 1) << 1 | (i >> 1 & 1);
    return __fmaf_rn((float)((int)((const u8 *)m.values)[at] - 128), scale, minimum);
}

/// A block a row.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
embed(const __grid_constant__ EmbedArgs a) {
    begin();
    u32 row = blockIdx.x;
    if (row >= a.step->rows) return;
    u32 token = a.step->tokens[row];
    if (token & FROM_SEAT) {
        token = a.seats[token & ~FROM_SEAT];
        // For those that come after the seat has got its next token.
        __syncthreads();
        if (threadIdx.x == 0) a.step->tokens[row] = token;
    }
    // A seat that nobody has filled must not become an address.
    if (token >= a.table.outputs) token = 0;
    u32 position = a.step->positions[row], type = a.step->types ? a.step->types[row] : 0;
    for (u32 i = threadIdx.x; i < a.table.inputs; i += ROW_THREADS) {
        float x = matrix_value(a.table, token, i);
        if (a.positions) x += a.positions[(u64)position * a.table.inputs + i];
        if (a.types) x += a.types[(u64)type * a.table.inputs + i];
        write(a.output, row, i, x);
    }
}

struct NormArgs {
    const Step *step;
    View input;
    const float *weight;
    const float *bias;  // layer normalisation if there
    View output;
    View copy;  // a second output, or null
    u32 width;
    u32 gathered;
    float eps;
    u32 unused;
};

/// A block a row. The row is read once and kept: `8 × threads` values in registers, more are read
/// again.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
norm_rows(const __grid_constant__ NormArgs a) {
    begin();
    SHARED_MEMORY(shared);
    float *scratch = (float *)shared;
    u32 row = blockIdx.x;
    if (row >= row_count(a.step, a.gathered)) return;
    constexpr int KEPT = 8;
    float kept[KEPT];
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int j = 0; j < KEPT; ++j) {
        u32 i = threadIdx.x + j * ROW_THREADS;
        kept[j] = i < a.width ? read(a.input, row, i) : 0.0f;
        sum += kept[j];
        squares += kept[j] * kept[j];
    }
    for (u32 i = threadIdx.x + KEPT * ROW_THREADS; i < a.width; i += ROW_THREADS) {
        float x = read(a.input, row, i);
        sum += x;
        squares += x * x;
    }
    float mean = 0.0f;
    if (a.bias) {
        mean = block_sum<ROW_THREADS>(sum, scratch) / (float)a.width;
        __syncthreads();
        // Around the mean, for values far from zero would cancel.
        squares = 0.0f;
#pragma unroll
        for (int j = 0; j < KEPT; ++j) {
            float x = threadIdx.x + j * ROW_THREADS < a.width ? kept[j] - mean : 0.0f;
            squares += x * x;
        }
        for (u32 i = threadIdx.x + KEPT * ROW_THREADS; i < a.width; i += ROW_THREADS) {
            float x = read(a.input, row, i) - mean;
            squares += x * x;
        }
    }
    float variance = block_sum<ROW_THREADS>(squares, scratch) / (float)a.width;
    float inverse = rsqrtf(variance + a.eps);
    auto finish = [&](u32 i, float x) {
        float y = (x - mean) * inverse * a.weight[i];
        if (a.bias) y += a.bias[i];
        write(a.output, row, i, y);
        if (a.copy.data) write(a.copy, row, i, y);
    };
    // Input and output may be the same buffer: each thread writes what only it has read.
#pragma unroll
    for (int j = 0; j < KEPT; ++j) {
        u32 i = threadIdx.x + j * ROW_THREADS;
        if (i < a.width) finish(i, kept[j]);
    }
    for (u32 i = threadIdx.x + KEPT * ROW_THREADS; i < a.width; i += ROW_THREADS) {
        finish(i, read(a.input, row, i));
    }
}

struct GatedSiluArgs {
    const Step *step;
    View input;  // gate, then up
    View output;
    u32 width;  // of the output
    u32 unused;
};

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
gated_silu(const __grid_constant__ GatedSiluArgs a) {
    begin();
    u32 row = blockIdx.y, i = blockIdx.x * ROW_THREADS + threadIdx.x;
    if (row >= a.step->rows || i >= a.width) return;
    float gate = read(a.input, row, i), up = read(a.input, row, a.width + i);
    write(a.output, row, i, silu_times(gate, up));
}

struct CopyArgs {
    const Step *step;
    View input, output;
    u32 width;
    u32 rows;
};

/// Which rows: all, those of the gather list, or as many as were gathered.
constexpr u32 COPY_ALL = 0, COPY_GATHER = 1;

/// Copies rows, to another type where views differ.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
copy_rows(const __grid_constant__ CopyArgs a) {
    begin();
    u32 row = blockIdx.y, i = blockIdx.x * ROW_THREADS + threadIdx.x;
    if (row >= row_count(a.step, a.rows != COPY_ALL) || i >= a.width) return;
    u32 from = a.rows == COPY_GATHER ? a.step->gather[row] : row;
    write(a.output, row, i, read(a.input, from, i));
}

constexpr u32 POOL_MEAN = 0, POOL_FIRST = 1, POOL_LAST = 2;

struct PoolArgs {
    const Step *step;
    View input, output;
    u32 width;
    u32 kind;
    u32 normalize;
    u32 unused;
};

/// A block a span.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
pool(const __grid_constant__ PoolArgs a) {
    begin();
    SHARED_MEMORY(shared);
    if (blockIdx.x >= a.step->spans) return;
    Span span = a.step->span[blockIdx.x];
    u32 first = span.first, end = span.first + span.rows;
    if (a.kind == POOL_FIRST) end = first + 1;
    if (a.kind == POOL_LAST) first = end - 1;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < a.width; i += ROW_THREADS) {
        float sum = 0.0f;
        for (u32 row = first; row < end; ++row) sum += read(a.input, row, i);
        sum /= (float)(end - first);
        squares += sum * sum;
        write(a.output, blockIdx.x, i, sum);
    }
    if (!a.normalize) return;
    float length = sqrtf(block_sum<ROW_THREADS>(squares, (float *)shared));
    if (length == 0.0f) return;
    for (u32 i = threadIdx.x; i < a.width; i += ROW_THREADS) {
        write(a.output, blockIdx.x, i, read(a.output, blockIdx.x, i) / length);
    }
}

struct TakeInArgs {
    const Step *step;
    u64 *pages;  // of a lane: byte offset in the KV region, by group and layer
    u64 page_bytes;
};

/// Notes where the pages of new groups lie.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
take_in(const __grid_constant__ TakeInArgs a) {
    begin();
    u32 i = blockIdx.x * ROW_THREADS + threadIdx.x;
    if (i >= a.step->loans) return;
    Loan loan = a.step->loan[i];
    a.pages[loan.place] = (u64)loan.page * a.page_bytes;
}

struct CopyBlocksArgs {
    const Step *step;
    u8 *region;
    const u64 *pages;  // of a lane
    u32 layers;
    u32 block_bytes;  // a multiple of 16
};

/// A block of threads for each layer of each copy.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
copy_blocks(const __grid_constant__ CopyBlocksArgs a) {
    begin();
    u32 layer = blockIdx.x;
    if (layer >= a.layers || blockIdx.y >= a.step->copies) return;
    BlockCopy copy = a.step->copy[blockIdx.y];
    auto place = [&](uint2 block) {
        u64 page = a.pages[(u64)block.x * a.layers + layer];
        return (uint4 *)(a.region + page + (u64)block.y * a.block_bytes);
    };
    const uint4 *from = place(copy.from);
    uint4 *to = place(copy.to);
    for (u32 i = threadIdx.x; i < a.block_bytes / 16; i += ROW_THREADS) to[i] = from[i];
}
