#define TENFOLD_ISA avx2
#include "live.inc"
