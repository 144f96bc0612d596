// The translation unit: all kernels.
#include "attend.cu"
#include "cells.cu"
#include "dense.cu"
#include "dequantize.cu"
#include "encode.cu"
#include "merge.cu"
#include "tables.cu"
