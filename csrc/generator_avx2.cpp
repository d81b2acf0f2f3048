#define TENFOLD_ISA avx2
#include "generator.inc"
