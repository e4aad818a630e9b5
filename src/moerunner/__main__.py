"""`python -m moerunner`, also under torchrun."""

from moerunner.cli import main

if __name__ == "__main__":
    main()
