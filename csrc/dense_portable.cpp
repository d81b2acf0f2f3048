#define TENFOLD_ISA portable
#include "attention.inc"
#include "normalize.inc"
#include "pooling.inc"
