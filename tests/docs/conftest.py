"""What the pages' `path/to/model` is: the model that is shipped."""

from tests.serve.conftest import Server, shipped  # noqa: F401
