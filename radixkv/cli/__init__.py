"""The command line: `radixkv COMMAND …`."""


def main() -> None:
    """Run the command line and exit: 0 when it worked, 2 after a one-line error, 130 after Ctrl-C."""
    import sys

    try:
        from radixkv.cli.app import app
        from radixkv.cli.standard_streams import accept_all_text

        accept_all_text()
        app(prog_name="radixkv")
    except KeyboardInterrupt:  # while modules were being imported
        sys.exit(130)
