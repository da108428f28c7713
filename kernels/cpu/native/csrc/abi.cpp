// Sizes of the argument structures, for library.py to compare with its own.

#include "abi.h"

KVLOOM_API void kvloom_sizes(int64_t* sizes) {
  using namespace kvloom;
  const int64_t all[] = {sizeof(RowsView), sizeof(Totals), sizeof(AttendArgs), sizeof(NormArgs),
                         sizeof(RotateStoreArgs), sizeof(StoreArgs), sizeof(RotateArgs), sizeof(FoldArgs),
                         sizeof(SelectArgs), sizeof(RenewArgs), sizeof(PoolArgs), sizeof(SampleArgs),
                         sizeof(LinearArgs), sizeof(SiluArgs), sizeof(PackArgs), sizeof(RowsOfArgs),
                         sizeof(Call)};
  for (int64_t size : all) *sizes++ = size;
}
