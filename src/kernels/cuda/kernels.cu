// All kernels, as one unit: compiled for each chip, and by the tests for the emulator.
#include "rows.cu"
#include "linear.cu"
#include "product.cu"
#include "product_quants.cu"
#include "rope.cu"
#include "attention.cu"
#include "sample.cu"
#include "refine.cu"
