#define TENFOLD_ISA avx512
#include "attention.inc"
#include "pooling.inc"
