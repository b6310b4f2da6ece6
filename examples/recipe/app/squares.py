import sys

for n in range(int(sys.argv[1])):
    print(n * n)
