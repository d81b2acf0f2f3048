#define TENFOLD_ISA avx2
#include "labnet.inc"
