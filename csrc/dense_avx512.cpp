#define TENFOLD_ISA avx512
#include "attention.inc"
#include "normalize.inc"
#include "pooling.inc"
