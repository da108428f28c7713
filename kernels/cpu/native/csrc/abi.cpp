// What library.py asks a library before it calls it.

#include "abi.h"
#include "amx.h"

// Whether it was compiled with AMX tiles: bit 0 in linear layers, bit 1 in attention. A compiler may know fewer instructions
// than the processor it compiles for.
KVLOOM_API int32_t kvloom_tiles() {
  int32_t found = 0;
#ifdef KVLOOM_AMX
  found |= 1;
#endif
#ifdef KVLOOM_AMX_BF16
  found |= 2;
#endif
  return found;
}

// Sizes of the argument structures, for library.py to compare with its own.

KVLOOM_API void kvloom_sizes(int64_t* sizes) {
  using namespace kvloom;
  const int64_t all[] = {sizeof(RowsView), sizeof(Totals), sizeof(AttendArgs), sizeof(NormArgs),
                         sizeof(RotateStoreArgs), sizeof(StoreArgs), sizeof(RotateArgs), sizeof(FoldArgs),
                         sizeof(SelectArgs), sizeof(RenewArgs), sizeof(PoolArgs), sizeof(SampleArgs),
                         sizeof(LinearArgs), sizeof(SiluArgs), sizeof(PackArgs), sizeof(RowsOfArgs),
                         sizeof(Call)};
  for (int64_t size : all) *sizes++ = size;
}
