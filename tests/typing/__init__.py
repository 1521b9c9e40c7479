"""What type checkers make of the public interface."""  # noqa: A005 - a folder of tests, imported as tests.typing
