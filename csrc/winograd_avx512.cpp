#define TENFOLD_ISA avx512
#include "winograd.inc"

#include "layout.inc"
