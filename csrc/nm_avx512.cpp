#define TENFOLD_ISA avx512
#include "nm.inc"
