import gendiff  # noqa: F401 (prepares the process of a command before other libraries are imported)
