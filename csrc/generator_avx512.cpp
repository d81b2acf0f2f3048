#define TENFOLD_ISA avx512
#include "generator.inc"
