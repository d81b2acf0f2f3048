#define TENFOLD_ISA avx2
#include "winograd.inc"

#include "layout.inc"
