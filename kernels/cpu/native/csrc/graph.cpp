// The calls of a step in one: a captured graph is replayed without coming back to Python in between.

#include "abi.h"

KVLOOM_API void kvloom_replay(const kvloom::Call* calls, int64_t count, int64_t rows) {
  for (const kvloom::Call* call = calls; call < calls + count; call++) {
    if (call->rows) *call->rows = rows;
    call->run(call->args);
  }
}
