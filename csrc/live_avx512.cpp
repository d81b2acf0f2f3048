#define TENFOLD_ISA avx512
#include "live.inc"
