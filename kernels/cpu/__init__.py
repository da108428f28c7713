"""Back ends for CPUs alone: `native`, a C++ library built on the machine that runs it. Importing this loads nothing."""
