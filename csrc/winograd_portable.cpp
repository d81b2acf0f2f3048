#define TENFOLD_ISA portable
#include "winograd.inc"

#include "layout.inc"
