"""`python -m ask`: see cli.py. Ctrl-C ends it with one line and status 130 at any moment."""
import os
import signal

def leave(*_):
    try:
        os.write(2, b"\ninterrupted\n")
    finally:
        os._exit(130)

if __name__ == "__main__":
    # While torch is imported, and at exit, KeyboardInterrupt could get lost or print a traceback:
    # this handler leaves at once. In between, main() takes care of it.
    raises = signal.getsignal(signal.SIGINT)
    handled = raises is signal.default_int_handler          # False in a background job
    if handled:
        signal.signal(signal.SIGINT, leave)
    from ask.cli import main

    try:
        if handled:
            signal.signal(signal.SIGINT, raises)
        status = main()
        if handled:
            signal.signal(signal.SIGINT, leave)
    except KeyboardInterrupt:
        leave()
    raise SystemExit(status)
