// The translation unit: all kernels.
#include "attend.cu"
#include "dense.cu"
#include "dequantize.cu"
#include "encode.cu"
#include "merge.cu"
#include "published.cu"
#include "store.cu"
#include "tables.cu"
