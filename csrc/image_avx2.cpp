#define TENFOLD_ISA avx2
#include "lab.inc"
#include "resize.inc"
#include "ssim.inc"
