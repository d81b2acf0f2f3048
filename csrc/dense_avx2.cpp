#define TENFOLD_ISA avx2
#include "attention.inc"
#include "pooling.inc"
