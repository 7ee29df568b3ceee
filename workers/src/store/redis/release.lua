-- Gives back the unique keys that are taken until their jobs begin. ARGV: for each job that begins: unique key, id.
for i = 1, #ARGV, 2 do
  give_back(ARGV[i], ARGV[i + 1], true)
end
return 1
