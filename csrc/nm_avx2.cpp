#define TENFOLD_ISA avx2
#include "nm.inc"
