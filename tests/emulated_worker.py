"""A worker of the interpreter that runs inline PTX too (ptx_emulator.py), for tests/ops/test_by_warps.py."""

import ptx_emulator
from tri_mpk import _interpreter_worker

ptx_emulator.install()
_interpreter_worker.main()
