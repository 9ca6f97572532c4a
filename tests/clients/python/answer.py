"""Runs functions of a program: a name per line of stdin, an object with `value` or `error` per line of stdout."""

import json
import os
import runpy
import sys
import traceback

answers = os.fdopen(os.dup(1), "w")  # whatever else prints goes to stderr
os.dup2(2, 1)
functions = runpy.run_path(sys.argv[1])
for line in sys.stdin:
    try:
        answer = {"value": functions[line.strip()]()}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    print(json.dumps(answer), file=answers, flush=True)
