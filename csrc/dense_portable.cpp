#define TENFOLD_ISA portable
#include "attention.inc"
#include "pooling.inc"
