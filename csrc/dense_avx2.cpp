#define TENFOLD_ISA avx2
#include "attention.inc"
#include "normalize.inc"
#include "pooling.inc"
