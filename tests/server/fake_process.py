"""A server process with the fake engine, for tests of signals and exit codes: fake_process.py STEP_SECONDS [serve's flags].

The engine dies when it is asked for the prompt "die".
"""

import importlib.util
import sys
import threading
import time
from pathlib import Path

from kvloom.engine.errors import ModelNotFoundError
from kvloom.server import cli, serve


def start(config, progress):
    """A fake that can be told to die by a prompt."""
    spec = importlib.util.spec_from_file_location("fakes", Path(__file__).with_name("fakes.py"))
    fakes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fakes)
    if config.model.model == "absent":
        raise ModelNotFoundError("there is no model\n'absent'")
    progress("loading weights", 1, 2)
    if config.model.model == "endless":  # an engine's thread that nothing ends
        threading.Thread(target=time.sleep, args=(60,)).start()
        time.sleep(60)
    engine = fakes.FakeEngine(step_seconds=float(sys.argv[1]))
    die, generate = engine.tokenizer.encode("die"), engine.generate

    def deadly(prompt, *args, **kwargs):
        if list(prompt) == die:
            engine.dead = "told to die"
        return generate(prompt, *args, **kwargs)

    engine.generate = deadly
    return engine


if __name__ == "__main__":
    serve._start_engine = start
    sys.exit(cli.main(["serve", *sys.argv[2:]]))
