class Varlen:
    name="varlen"
class Flash:
    name="flash"
