def find_family(c):
    return None
