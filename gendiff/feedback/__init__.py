"""Labels from people: a web page that asks for them, the file that keeps them, and what a method reads out of it.

`samples` reads what is to be labelled, `labels` keeps the marks, `consensus` merges raters, and `ask` opens the page
and waits; `render` draws one sample, `board` and `server` are behind the page; `regular` and `pictures` open files.
`python -m gendiff.feedback --help` is the command line.
"""
