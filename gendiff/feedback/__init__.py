"""Human labels: a web page to mark samples, the file of labels, and the merging of raters.

`samples` reads the samples, `labels` stores the marks, `consensus` merges raters, and `ask` opens the page and waits.
`render` draws a sample, `board` and `server` run the page, `regular` and `pictures` read files.
`python -m gendiff.feedback --help` is the command line.
"""
