import os

import six

with open(os.path.join(os.environ["REPORT_DATA"], "squares.txt")) as f:
    print("six", six.__version__, "sum of squares", sum(map(int, f)))
